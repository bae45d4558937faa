//! Benchmarks: contenders in interleaved rounds on one machine, ratios of medians, no timed tests.

pub mod compare;
mod cpu;
pub mod encryption;
mod kube_proxy;
pub mod lb;
pub mod preload;
pub mod program;
pub mod propagate;
mod services;
mod site;
pub mod soak;
pub mod store;
pub mod tunnel;

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

use tokio::process::Command;

use crate::lab::host::command_in;
use compare::Figure;

/// A group of rows that are measured together and written to one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Records to maps.
    Program,
    /// Socket load-balancing.
    Lb,
    /// Pod to pod across nodes.
    Tunnel,
    /// Records to the kernels of another cluster, and an agent's memory.
    Propagate,
}

impl Suite {
    /// All suites, in the order in which they run.
    pub const ALL: [Self; 4] = [Self::Program, Self::Lb, Self::Tunnel, Self::Propagate];

    /// Name of the suite and of its file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Lb => "lb",
            Self::Tunnel => "tunnel",
            Self::Propagate => "propagate",
        }
    }

    /// Its rows.
    #[must_use]
    pub const fn ids(self) -> &'static [&'static str] {
        match self {
            Self::Program => &program::IDS,
            Self::Lb => &lb::IDS,
            Self::Tunnel => &tunnel::IDS,
            Self::Propagate => &propagate::IDS,
        }
    }

    /// Programs that it needs beside those of the lab, with the package that has each.
    #[must_use]
    pub const fn tools(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Program | Self::Propagate => &[],
            Self::Lb => &[("iptables-legacy-restore", "iptables"), ("nft", "nftables")],
            Self::Tunnel => &[("iperf3", "iperf3"), ("ss", "iproute2")],
        }
    }

    /// Measures the rows of this suite that are wanted.
    ///
    /// # Errors
    /// When something cannot be measured; a missed target is no error.
    pub async fn run(
        self,
        rounds: usize,
        wanted: &Wanted,
        progress: &dyn Fn(&str),
    ) -> Result<Vec<Figure>> {
        let figures = match self {
            Self::Program => program::run_all(rounds, progress).await?,
            Self::Lb => lb::run_all(rounds, wanted, progress).await?,
            Self::Tunnel => tunnel::run_all(rounds, wanted, progress).await?,
            Self::Propagate => propagate::run_all(rounds, progress).await?,
        };
        Ok(figures
            .into_iter()
            .filter(|figure| wanted.has(&figure.id))
            .collect())
    }
}

/// A command that runs before all other work of the machine, which would be measured otherwise.
fn real_time(netns: &str, cgroup: Option<&Path>, program: &Path) -> Command {
    let mut command = command_in(netns, cgroup, Path::new("chrt"));
    command.args(["-f", "50"]).arg(program);
    command
}

/// Which rows are asked for.
#[derive(Clone, Debug, Default)]
pub struct Wanted(BTreeSet<String>);

impl Wanted {
    /// Rows by id, or all rows of a suite by its name; none = everything.
    ///
    /// # Errors
    /// When a name is neither.
    pub fn of(names: &[String]) -> Result<Self> {
        let mut ids = BTreeSet::new();
        for name in names {
            let matching: Vec<_> = Suite::ALL
                .iter()
                .flat_map(|suite| suite.ids().iter().map(|id| (suite.name(), *id)))
                .filter(|(suite, id)| name == suite || name == id)
                .map(|(_, id)| id.to_owned())
                .collect();
            anyhow::ensure!(!matching.is_empty(), "no row or suite is named {name}");
            ids.extend(matching);
        }
        Ok(Self(ids))
    }

    /// True for a row that is asked for.
    #[must_use]
    pub fn has(&self, id: &str) -> bool {
        self.0.is_empty() || self.0.contains(id)
    }

    /// True for a suite that has such a row.
    #[must_use]
    pub fn has_any_of(&self, suite: Suite) -> bool {
        suite.ids().iter().any(|id| self.has(id))
    }
}

/// Writes `NAME.json` into `folder`.
///
/// # Errors
/// When the folder or the file cannot be written.
pub fn write(folder: &Path, name: &str, figures: &[Figure]) -> Result<()> {
    let path = folder.join(format!("{name}.json"));
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&path, format!("{:#}\n", serde_json::json!(figures))))
        .with_context(|| path.display().to_string())
}

/// As [`write()`], but rows of the file that are not among `figures` stay.
///
/// # Errors
/// When the folder or the file cannot be written, or what is there is no such file.
pub fn update(folder: &Path, name: &str, figures: &[Figure]) -> Result<()> {
    let path = folder.join(format!("{name}.json"));
    let mut rows: Vec<serde_json::Value> = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    for figure in figures {
        let row = serde_json::json!(figure);
        match rows.iter_mut().find(|old| old["id"] == row["id"]) {
            Some(old) => *old = row,
            None => rows.push(row),
        }
    }
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(&path, format!("{:#}\n", serde_json::json!(rows))))
        .with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_not_measured_again_stay() {
        use compare::{Named, Target, alone};
        let figure = |id, value| {
            let named = Named {
                id,
                row: "x",
                unit: "s",
            };
            alone(named, &[value], Target::Report)
        };
        let folder = tempfile::tempdir().unwrap();
        update(folder.path(), "x", &[figure("a", 1.0), figure("b", 2.0)]).unwrap();
        update(folder.path(), "x", &[figure("b", 3.0)]).unwrap();
        let text = std::fs::read(folder.path().join("x.json")).unwrap();
        let rows: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            (&rows[0]["ours"], &rows[1]["ours"]),
            (&1.0.into(), &3.0.into())
        );
    }

    #[test]
    fn rows_are_wanted_by_id_by_suite_or_all() {
        let all = Wanted::of(&[]).unwrap();
        assert!(all.has("lb-rate") && all.has_any_of(Suite::Tunnel));
        let some = Wanted::of(&["lb".to_owned(), "change-one".to_owned()]).unwrap();
        assert!(some.has("lb-nft") && some.has("change-one") && !some.has("program-10k"));
        assert!(some.has_any_of(Suite::Program) && !some.has_any_of(Suite::Tunnel));
        assert!(Wanted::of(&["nonsense".to_owned()]).is_err());
    }
}
