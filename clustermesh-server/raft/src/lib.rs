//! openraft wired to core and store: batcher, reads, leases, watch hub.
