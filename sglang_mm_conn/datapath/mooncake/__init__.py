"""The Mooncake data path: RDMA or TCP writes between hosts, both of its sides."""
