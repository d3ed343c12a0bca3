"""What `bench transfers` measures where its options do not say. Imports nothing, so that --help answers at once."""

SIZES = "64K,1M,16M,128M,512M"
QUICK_SIZES = "64K,1M,16M"
TRANSPORTS = "memcpy,shm,shm+key,mooncake,mooncake+key,zmq_to_scheduler,mooncake_builtin,tcp,engine"
ROUNDS, QUICK_ROUNDS = 7, 3
WIDTH, BLOCK_SIZE = 4096, 128  # bfloat16 values in a row, rows in a block
