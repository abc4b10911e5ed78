-- Hand a lease over, with a full life, from one holder to the same or another one.
--
-- KEYS[1]  lease
-- ARGV     old holder, new holder, milliseconds
-- Returns  1 if the old holder had the lease, else 0
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
