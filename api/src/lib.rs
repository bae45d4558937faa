//! The contract: protobuf, key schema, records, validation and limits; no I/O.
