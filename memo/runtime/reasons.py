"""Why a look-up was a miss: one word each, the same in events, statistics and explanations."""

ABSENT = "not cached yet"  # no tier has an entry
EXPIRED = "expired"  # past its ttl and its stale windows
INVALIDATED = "invalidated"  # a generation turned since the computation began
GENERATION_LOST = "validity record lost"  # flushed or evicted: nothing tells if it holds
FILE_CHANGED = "file changed"
DEPENDENCY_CHANGED = "dependency changed"  # a depends_on callable answers something else
UNREADABLE = "unreadable"  # damaged, truncated, of another format, or it does not load
UNAUTHENTIC = "signed with another secret"  # no secret of this process sealed it
OLDER = "older"  # an answer already given was computed later (I2)
CLOCK = "clock"  # from the future: its age cannot be told
PAYLOAD_MISSING = "payload missing"  # the record is here, its buffers are not
UNREACHABLE = "validity not known"  # every tier that could tell is away
DISABLED = "disabled"
SOURCE_UNREACHABLE = "dependency unreachable"  # a remote source does not say what it is now
