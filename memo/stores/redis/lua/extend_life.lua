-- Let a group of generations live as long as an entry that names it.
--
-- KEYS[1]  the group
-- ARGV     milliseconds; "1" if a longer life may be shortened to them
-- Returns  1
local left = redis.call('PTTL', KEYS[1])
if left ~= -2 and (ARGV[2] == '1' or left < tonumber(ARGV[1])) then
  redis.call('PEXPIRE', KEYS[1], ARGV[1])
end
return 1
