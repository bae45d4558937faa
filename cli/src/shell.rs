//! Completion scripts and man pages, made from the definitions of the commands.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use clap::CommandFactory as _;

use crate::{args::Cli, output};

pub fn completion(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "clustermesh", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

pub fn man_pages(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    clap_mangen::generate_to(Cli::command(), directory)
        .with_context(|| format!("cannot write man pages to {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_man_page() {
        let folder = tempfile::tempdir().unwrap();
        man_pages(folder.path()).unwrap();
        for page in [
            "clustermesh",
            "clustermesh-status",
            "clustermesh-get",
            "clustermesh-dev-ca-issue",
        ] {
            let text = fs::read_to_string(folder.path().join(format!("{page}.1"))).unwrap();
            assert!(text.contains("SYNOPSIS"), "{page}");
        }
    }
}
