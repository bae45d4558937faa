//! CPU time and memory of server processes, from `/proc` (proc(5)).

use anyhow::{Context, Result};
use nix::unistd::{Pid, SysconfVar, sysconf};

use crate::judges::group::Group;

/// CPU seconds that all replicas have used since they started.
pub fn cpu_seconds(group: &Group) -> Result<f64> {
    let mut sum = 0.0;
    for member in group.members() {
        sum += process_cpu_seconds(member.process()?.pid())?;
    }
    Ok(sum)
}

/// Mean resident memory of the replicas.
pub fn resident_mib(group: &Group) -> Result<f64> {
    let mut sum = 0.0;
    for member in group.members() {
        sum += process_resident_mib(member.process()?.pid())?;
    }
    Ok(sum / super::load::count(group.members().len()))
}

fn process_cpu_seconds(pid: Pid) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in brackets may hold anything; fields are counted after it.
    let (_, fields) = stat.rsplit_once(')').context("stat of a process")?;
    let field = |number: usize| -> Result<f64> {
        let text = fields.split_whitespace().nth(number - 3);
        Ok(text.context("stat of a process")?.parse()?)
    };
    let ticks = sysconf(SysconfVar::CLK_TCK)?.context("clock ticks")?;
    let ticks = f64::from(u32::try_from(ticks)?);
    Ok((field(14)? + field(15)?) / ticks)
}

fn process_resident_mib(pid: Pid) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: f64 = line
        .and_then(|rest| rest.split_whitespace().next())
        .context("VmRSS")?
        .parse()?;
    Ok(kib / 1_024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_used_cpu() {
        let own = nix::unistd::getpid();
        assert!(process_resident_mib(own).unwrap() > 0.5);
        assert!(process_cpu_seconds(own).unwrap() >= 0.0);
    }
}
