//! Cuts between the replicas of a cluster: packets that one sends to another vanish where they arrive.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use tokio::process::Command;

use super::cluster::Cluster;
use super::host::{netns_path, run};

/// The table of rules, in the namespace of the replica that does not hear.
const TABLE: &str = "inet lab_cut";

/// What vanishes on the way from one replica to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Every packet. What flows the other way still arrives, but is never acknowledged.
    Packets,
    /// Connections that the one opens to the other: it cannot call, but be called.
    Calls,
}

impl Cluster {
    /// From now on the replica at place `to` does not hear the one at `from`; clients hear and reach both.
    ///
    /// # Errors
    /// When `nft` (package nftables) fails.
    pub async fn cut(&self, from: usize, to: usize, what: Cut) -> Result<()> {
        let from = self.replica(from).address();
        let matched = match what {
            Cut::Packets => format!("ip saddr {from}"),
            Cut::Calls => format!("ip saddr {from} tcp dport 2380"),
        };
        let mut rules = format!("add table {TABLE}\n");
        writeln!(
            rules,
            "add chain {TABLE} input {{ type filter hook input priority 0; }}"
        )?;
        writeln!(rules, "add rule {TABLE} input {matched} drop")?;
        self.nft(to, &rules).await
    }

    /// Cuts both ways between one replica and all others.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub async fn isolate(&self, alone: usize) -> Result<()> {
        for other in (0..self.replicas().len()).filter(|other| *other != alone) {
            self.cut(alone, other, Cut::Packets).await?;
            self.cut(other, alone, Cut::Packets).await?;
        }
        Ok(())
    }

    /// Ends all cuts.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub async fn heal(&self) -> Result<()> {
        for replica in 0..self.replicas().len() {
            // Made first, so that there is one to delete.
            let rules = format!("add table {TABLE}\ndelete table {TABLE}\n");
            self.nft(replica, &rules).await?;
        }
        Ok(())
    }

    async fn nft(&self, replica: usize, rules: &str) -> Result<()> {
        let netns = netns_path(self.replica(replica).netns());
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", netns.display()))
            .args(["nft", rules]);
        run(&mut command).await.context("nft (package nftables)")?;
        Ok(())
    }
}
