//! Generated messages of the log and of snapshots.
#![expect(
    missing_docs,
    reason = "generated; the .proto files carry the comments"
)]

include!(concat!(env!("OUT_DIR"), "/clustermesh.core.v1.rs"));

impl From<proposal::Command> for Proposal {
    /// A proposal that names nobody: refused while auth is enabled.
    fn from(command: proposal::Command) -> Self {
        Self {
            command: Some(command),
            ..Self::default()
        }
    }
}

impl Proposal {
    /// A proposal of the server itself, which no user's permissions bind.
    #[must_use]
    pub fn system(command: proposal::Command) -> Self {
        Self {
            system: true,
            ..command.into()
        }
    }
}
