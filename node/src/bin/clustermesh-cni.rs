//! Entry point of the CNI plugin.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use clustermesh_node_core::cni::{CONFIG_BYTES_MAX, CniError, code};

fn main() -> ExitCode {
    let outcome = run();
    let (text, exit) = match outcome {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (serde_json::to_string(&error).ok(), ExitCode::FAILURE),
    };
    if let Some(text) = text
        && writeln!(std::io::stdout(), "{text}").is_err()
    {
        return ExitCode::FAILURE;
    }
    exit
}

fn run() -> Result<Option<String>, CniError> {
    let failed = |error: std::io::Error| {
        CniError::new(
            code::IO_FAILURE,
            "the plugin cannot start",
            error.to_string(),
        )
    };
    let mut stdin = Vec::new();
    std::io::stdin()
        .take(CONFIG_BYTES_MAX as u64 + 1)
        .read_to_end(&mut stdin)
        .map_err(failed)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?
        .block_on(clustermesh_node::cni_plugin::answer(
            |name| std::env::var(name).ok(),
            &stdin,
        ))
}
