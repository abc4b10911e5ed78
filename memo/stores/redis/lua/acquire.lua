-- Take a lease that is free, or that this holder has.
--
-- KEYS     lease, bell
-- ARGV     holder, milliseconds
-- Answer   empty, or the present holder and the milliseconds its lease still has
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return {holder, redis.call('PTTL', KEYS[1])} end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {}
