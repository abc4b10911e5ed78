-- Take a lease if it is free or this holder has it.
--
-- KEYS     lease, bell
-- ARGV     holder, milliseconds
-- Returns  nothing, or the current holder and the milliseconds its lease still has
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {holder, redis.call('PTTL', KEYS[1])} end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {}
