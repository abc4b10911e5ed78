-- Release a lease and ring its bell.
--
-- KEYS     lease, bell
-- ARGV     holder, milliseconds that the bell lives
-- Returns  1 if the holder had the lease, else 0
--
-- Waiters move the bell's one element onto itself, so each of them is woken once.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('RPUSH', KEYS[2], '1')
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
