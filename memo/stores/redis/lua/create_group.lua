-- Give a group of generations a main token if it has none, and extend its life.
--
-- KEYS[1]  the group, a hash
-- ARGV     a fresh token; milliseconds that the group lives; "1" to extend the life of an existing
--          group to that too; then the fields to read
-- Returns  1 if the token was created here, else 0; then the fields
--
-- A value of another type at this key is not ours and is replaced.  A command that takes no memory
-- comes first: a full Redis then lets the rest of the script pass.
if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then
  redis.call('DEL', KEYS[1])
end
redis.call('HDEL', KEYS[1], '')
local made = redis.call('HSETNX', KEYS[1], '*', ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 or made == 1 or (ARGV[3] == '1' and left < tonumber(ARGV[2])) then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
local fields = {}
for i = 4, #ARGV do fields[i - 3] = ARGV[i] end
local answer = redis.call('HMGET', KEYS[1], unpack(fields))
table.insert(answer, 1, made)
return answer
