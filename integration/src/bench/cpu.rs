//! CPU time of processes: a figure that other work on the machine hardly moves.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::unistd::Pid;

/// CPU time of all threads of a process so far; of threads that have ended, nothing.
///
/// # Errors
/// When the process is gone.
pub(super) fn time(process: Pid) -> Result<Duration> {
    let folder = format!("/proc/{process}/task");
    let mut total = Duration::ZERO;
    for thread in std::fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = thread?.path().join("schedstat");
        // A thread may end between the two looks.
        if let Ok(text) = std::fs::read_to_string(&path) {
            total += on_cpu(&text).with_context(|| format!("{}: {text:?}", path.display()))?;
        }
    }
    Ok(total)
}

/// The first number of `schedstat`: time on a CPU, ns (Documentation/scheduler/sched-stats.rst).
fn on_cpu(schedstat: &str) -> Option<Duration> {
    let first = schedstat.split_whitespace().next()?;
    Some(Duration::from_nanos(first.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_is_the_time_on_a_cpu() {
        assert_eq!(
            on_cpu("1500000 200 7\n"),
            Some(Duration::from_micros(1_500))
        );
        assert_eq!(on_cpu("\n"), None);
    }

    #[test]
    fn a_process_that_works_uses_its_cpu() {
        let (before, mut sum) = (time(Pid::this()).unwrap(), 0_u64);
        while time(Pid::this()).unwrap() < before + Duration::from_millis(5) {
            sum = sum.wrapping_add(1);
        }
        assert!(sum > 0);
    }
}
