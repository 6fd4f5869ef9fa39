-- One commit of one shard: its changed rows and its new record, all or nothing.
--
-- KEYS[1]  the shard's commit record      ARGV[1]  the record that this writer last read or wrote
--                                         ARGV[2]  the new record
-- KEYS[i]  a row, i = 2 …                 ARGV[2i - 1]  its bytes, empty to delete it
--                                         ARGV[2i]      when it expires, ms since the epoch
--
-- Returns 1 when done; 0, having changed nothing, when the record is not the expected one: another writer has claimed
-- the shard, or Redis has come back with other data.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
for i = 2, #KEYS do
  if ARGV[2 * i - 1] == '' then
    redis.call('DEL', KEYS[i])
  else
    redis.call('SET', KEYS[i], ARGV[2 * i - 1], 'PXAT', ARGV[2 * i])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return 1
