"""The reasons of a miss, a few words each; the same in events, statistics and explanations."""

ABSENT = "not cached yet"  # no tier has an entry
EXPIRED = "expired"  # past its ttl and its stale windows
INVALIDATED = "invalidated"  # a generation was turned since the computation began
GENERATION_LOST = "validity record lost"  # flushed or evicted, so it is unknown if it holds
FILE_CHANGED = "file changed"
DEPENDENCY_CHANGED = "dependency changed"  # a depends_on callable answers something else
UNREADABLE = "unreadable"  # damaged, truncated, of another format, or it does not load
UNAUTHENTIC = "signed with another secret"  # no secret of this process sealed it
OLDER = "older"  # an answer already given was computed later (I2)
CLOCK = "clock"  # from the future: its age is unknown
PAYLOAD_MISSING = "payload missing"  # the record is here, its buffers are not
UNREACHABLE = "validity not known"  # every tier that could be asked is down
DISABLED = "disabled"
SOURCE_UNREACHABLE = "dependency unreachable"  # a remote source cannot be queried
