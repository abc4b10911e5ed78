-- Invalidate a group of generations, or the entries in it that have some arguments.
--
-- KEYS[1]  the group, a hash
-- ARGV     shape ("" for the whole group); field; token and note; most fields a group may have;
--          milliseconds that a group lives which was missing; most shapes it may have
-- Returns  1
--
-- A missing group is written too, since a host may be about to restore its earlier state.
-- Without a `*` it makes no entry valid.
-- Turning the whole group, or exceeding its size, replaces all fields by a new `*`: every state that
-- was recorded before began with another one.  A value of another type is replaced.
-- A command that takes no memory comes first: a full Redis then lets the rest of the script pass.
local key, shape, field, value = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if redis.call('TYPE', key).ok ~= 'hash' then
  redis.call('DEL', key)
end
redis.call('HDEL', key, '')
local left = redis.call('PTTL', key)
local count = 0
if shape ~= '' then
  redis.call('HSET', key, field, value, '!', value)
  local shapes = redis.call('HGET', key, '?')
  if not shapes or shapes == '' then
    shapes = shape
  elseif not ('|' .. shapes .. '|'):find('|' .. shape .. '|', 1, true) then
    shapes = shapes .. '|' .. shape
  end
  redis.call('HSET', key, '?', shapes)
  count = 1 + select(2, shapes:gsub('|', ''))
end
if shape == '' or count > tonumber(ARGV[6]) or redis.call('HLEN', key) > tonumber(ARGV[4]) then
  redis.call('DEL', key)
  redis.call('HSET', key, '*', value, '!', value)
end
if left > 0 then
  redis.call('PEXPIRE', key, left)
else
  redis.call('PEXPIRE', key, ARGV[5])
end
return 1
