//! Addresses to listen on, with an error that says how one is written.

use std::net::SocketAddr;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Reads `ADDRESS:PORT`.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(reader: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(reader)?;
    text.parse().map_err(|_| {
        D::Error::custom(format!(
            "{text:?} is not ADDRESS:PORT, as in \"0.0.0.0:2379\" or \"[::]:2379\"; a host name is none"
        ))
    })
}

/// The same where the key is there.
pub(super) fn deserialize_some<'de, D: Deserializer<'de>>(
    reader: D,
) -> Result<Option<SocketAddr>, D::Error> {
    deserialize(reader).map(Some)
}
