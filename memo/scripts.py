"""Scripts: what Redis does in one step for memo, as Lua, and how a command looks on the wire.

Rules of this module:

1.  Every script gets a *nonce* as its first argument and gives it back as the first element of its
    answer.  An answer that belongs to another request, as a damaged or cancelled exchange can leave
    behind on a connection, is so never taken for one's own.
2.  Group names in stamps carry no namespace; the scripts put the prefix in front.
3.  What is computed here is what `memo.stamps.read` computes, to the byte.  Strings are ordered by
    their bytes: Lua's own `<` follows the locale of the server.
4.  A script whose few bytes must get through a full Redis begins with a command that takes no
    memory (`HDEL`, `DEL`): Redis then lets the rest of it pass, so as not to leave it half done.
5.  A record that is not ours is handed back with no states; no byte of it can make a script fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha1
from typing import NamedTuple

from memo.seal import MAGIC
from memo.stamps import FIELDS, TOKEN
from memo.transit import Sink


def pack(*words: bytes) -> bytes:
    """A command as Redis reads it."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        parts += (b"$%d\r\n" % len(word), word, b"\r\n")
    return b"".join(parts)


class Question(NamedTuple):
    """What is sent, and what is expected.

    Attributes:
        parts: packed commands, in order.
        replies: how many replies they have.
        seconds: the deadline.
        blocks: they wait at the server.
        body: gives, each time anew, what is sent between the first part and the rest, in pieces.
        sink: takes the bytes of the one reply, in a thread; the answer is whether it got them.
    """

    parts: Sequence[bytes | memoryview]
    replies: int
    seconds: float
    blocks: bool
    body: Callable[[], Iterator[bytes | memoryview]] | None = None
    sink: Sink | None = None


class Script:
    """A Lua script that Redis keeps by its digest.

    Args:
        text: Lua; `KEYS` are the keys, `ARGV[1]` the nonce, the arguments follow.
    """

    __slots__ = ("_digest", "_text")

    def __init__(self, text: str) -> None:
        self._text = text.encode()
        self._digest = sha1(self._text, usedforsecurity=False).hexdigest().encode()

    def by_digest(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """The command that runs it where it is known."""
        return pack(b"EVALSHA", self._digest, b"%d" % len(keys), *keys, *arguments)

    def load(self) -> bytes:
        """The command that makes it known."""
        return pack(b"SCRIPT", b"LOAD", self._text)

    def by_text(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """The command that makes it known and runs it."""
        return pack(b"EVAL", self._text, b"%d" % len(keys), *keys, *arguments)


_STATE = rf"""
local PREFIX = ARGV[2]

local function by_bytes(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = a:byte(i), b:byte(i)
    if x ~= y then return x < y end
  end
  return #a < #b
end

local function covering(shapes, arguments)
  local digests, found = {{}}, {{}}
  for _, pair in ipairs(arguments) do digests[pair[1]] = pair[2] end
  for shape in shapes:gmatch('[^|]+') do
    local values, covers = {{}}, true
    for part in shape:gmatch('[^,]+') do
      covers = covers and digests[part] ~= nil
      values[#values + 1] = digests[part]
    end
    if covers then found[#found + 1] = shape .. '=' .. table.concat(values, ',') end
  end
  table.sort(found, by_bytes)
  return found
end

local function call(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then error({{reply = answer}}) end
  return answer
end

local read = {{}}

local function state(group, arguments)
  local fields = read[group]
  if not fields then
    fields = call('HMGET', PREFIX .. group, '*', '!', '?')
    read[group] = fields
  end
  if not fields[1] or fields[1] == '' then return '', '' end
  local text, last = fields[1]:sub(1, {TOKEN}), ''
  if fields[2] then last = fields[2]:sub(1, {TOKEN}) end
  if arguments == cjson.null then
    return last == '' and text or text .. '|!:' .. last, last
  end
  if not fields[3] then return text, last end
  local names = covering(fields[3], arguments)
  if #names == 0 then return text, last end
  for i, value in ipairs(call('HMGET', PREFIX .. group, unpack(names))) do
    if value then text = text .. '|' .. names[i] .. ':' .. value:sub(1, {TOKEN}) end
  end
  return text, last
end

local function guarded(work, otherwise)
  local well, answer = pcall(work)
  if well then return answer end
  return type(answer) == 'table' and answer.reply or otherwise
end
"""

_MAGIC = "".join(f"\\{byte:03d}" for byte in MAGIC)

LOOKUP = Script(
    _STATE
    + rf"""
local record = redis.call('GET', KEYS[1])
if not record then return {{ARGV[1]}} end

local foreign = {{ARGV[1], record, false}}
if record:sub(1, {len(MAGIC)}) ~= '{_MAGIC}' then return foreign end

return guarded(function()
  local _, at, size = struct.unpack('>I4I4I4', record, 49)
  local answer, n = {{ARGV[1], record}}, 2
  for _, row in ipairs(cjson.decode(record:sub(at + 1, at + size))) do
    if row[1] == 'g' then
      answer[n + 1], answer[n + 2] = state(row[2], row[3])
      n = n + 2
    end
  end
  return answer
end, foreign)
"""
)
"""KEYS: the name.  ARGV: nonce, prefix of groups.  Answer: nonce; then, if it is there, the record;
then `text` and `last` of each of its generation stamps, or nil where it is no record of ours."""

STATES = Script(
    _STATE
    + r"""
return guarded(function()
  local answer = {ARGV[1]}
  for i, ref in ipairs(cjson.decode(ARGV[3])) do
    local text, last = state(ref[1], ref[2])
    if text == '' and ARGV[4] then
      call('HDEL', PREFIX .. ref[1], '')
      call('HSET', PREFIX .. ref[1], '*', ARGV[3 + i])
      read[ref[1]] = nil
      text, last = state(ref[1], ref[2])
    end
    answer[#answer + 1] = text
    answer[#answer + 1] = last
  end
  return answer
end, nil)
"""
)
"""ARGV: nonce, prefix, JSON of [group, arguments] and, to begin, a fresh token for each of them.
Answer: nonce, then `text` and `last` of each."""

TURN = Script(
    rf"""
local note = ARGV[4]
for i, turn in ipairs(cjson.decode(ARGV[3])) do
  local key, shape, field = ARGV[2] .. turn[1], turn[2], turn[3]
  local value = ARGV[4 + i] .. note
  redis.call('HDEL', key, '')
  if shape ~= '' then
    redis.call('HSET', key, field, value, '!', value)
    local shapes = redis.call('HGET', key, '?')
    if not shapes or shapes == '' then
      redis.call('HSET', key, '?', shape)
    elseif not ('|' .. shapes .. '|'):find('|' .. shape .. '|', 1, true) then
      redis.call('HSET', key, '?', shapes .. '|' .. shape)
    end
  end
  if shape == '' or redis.call('HLEN', key) > {FIELDS} then
    redis.call('DEL', key)
    redis.call('HSET', key, '*', value, '!', value)
  end
end
return {{ARGV[1]}}
"""
)
"""ARGV: nonce, prefix, JSON of [group, shape, field], note, a fresh token for each.  Answer: nonce.

A turn of the whole group, and one that makes it too long, replaces the group by a new `*`: every
state recorded before began with another one."""

ACQUIRE = Script(
    r"""
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[2] then return {ARGV[1], holder} end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return {ARGV[1]}
"""
)
"""KEYS: lease, bell.  ARGV: nonce, holder, milliseconds.  Answer: nonce; the present holder, if it
is another."""

RENEW = Script(
    r"""
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return {ARGV[1], 0} end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return {ARGV[1], 1}
"""
)
"""KEYS: lease.  ARGV: nonce, old holder, new holder, milliseconds.  Answer: nonce, whether it was
held by the old one."""

RELEASE = Script(
    r"""
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return {ARGV[1], 0} end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('RPUSH', KEYS[2], '1')
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {ARGV[1], 1}
"""
)
"""KEYS: lease, bell.  ARGV: nonce, holder, milliseconds that the bell rings.  Answer: nonce,
whether the holder had it.  Waiters move the bell's one element onto itself, so it wakes all."""
