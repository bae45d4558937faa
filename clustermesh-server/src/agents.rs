//! What agents speak: their stream and their sessions.

pub mod elsewhere;
pub mod listing;
pub mod registry;
pub mod report;
pub mod session;
pub mod stream;
