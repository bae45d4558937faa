//! Pure MVCC keyspace: transactions, leases, watch matching, compaction, snapshots.
