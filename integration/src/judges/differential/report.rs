//! What was compared, and what differed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use super::answer::Answer;
use super::operation::Op;

/// Differences that are kept; the others are only counted.
const DIFFERENCES_KEPT: usize = 20;
/// Lines of an operation or answer that are shown.
const SHOWN_LINES: usize = 60;
/// Of a line so many characters are shown: values can be large.
const SHOWN_CHARACTERS: usize = 160;

/// One operation that was answered differently.
#[derive(Clone, Debug)]
pub struct Difference {
    seed: u64,
    step: usize,
    op: String,
    lines: Vec<String>,
}

/// Everything that a run compared.
#[derive(Clone, Debug, Default)]
pub struct Report {
    seeds: Vec<u64>,
    answers: BTreeMap<(&'static str, String), usize>,
    differences: Vec<Difference>,
    /// How often each kind of difference was seen.
    kinds: BTreeMap<String, usize>,
}

impl Report {
    pub(super) fn begin(&mut self, seed: u64) {
        self.seeds.push(seed);
    }

    /// Notes an answer; false when the two servers are no longer in the same state.
    pub(super) fn compare(&mut self, step: usize, op: &Op, etcd: &Answer, ours: &Answer) -> bool {
        *self.answers.entry((op.name(), etcd.outcome())).or_default() += 1;
        if etcd == ours {
            return true;
        }
        let lines = unequal_lines(&etcd.to_string(), &ours.to_string());
        let kind = format!("{} {}", op.name(), without_digits(&lines.join("\n")));
        let seen = self.kinds.entry(kind).or_default();
        *seen += 1;
        if *seen == 1 && self.differences.len() < DIFFERENCES_KEPT {
            self.differences.push(Difference {
                seed: self.seeds.last().copied().unwrap_or_default(),
                step,
                op: format!("{op:#?}"),
                lines,
            });
        }
        etcd.leaves_same_state(ours)
    }

    /// What differed.
    #[must_use]
    pub fn differences(&self) -> &[Difference] {
        &self.differences
    }

    /// Seeds that were run.
    #[must_use]
    pub fn seeds(&self) -> &[u64] {
        &self.seeds
    }

    /// How often an operation got an outcome from etcd: `ok` or the text of an error.
    #[must_use]
    pub fn count(&self, op: &str, outcome: &str) -> usize {
        self.answers
            .iter()
            .filter(|((name, answer), _)| *name == op && answer == outcome)
            .map(|(_, count)| count)
            .sum()
    }

    /// Operations compared.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.answers.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} operations of seeds {:?}",
            self.operations(),
            self.seeds
        )?;
        for ((op, outcome), count) in &self.answers {
            writeln!(f, "{count:>8}  {op}: {outcome}")?;
        }
        for difference in &self.differences {
            write!(f, "{difference}")?;
        }
        if !self.kinds.is_empty() {
            writeln!(
                f,
                "{} differences of {} kinds",
                self.kinds.values().sum::<usize>(),
                self.kinds.len()
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nseed {}, step {}:", self.seed, self.step)?;
        writeln!(f, "{}", head(&self.op))?;
        for line in &self.lines {
            writeln!(f, "{}", shortened(line))?;
        }
        writeln!(f, "again: make differential SEED={}", self.seed)
    }
}

/// Differences of one kind have other numbers each time.
fn without_digits(text: &str) -> String {
    text.chars()
        .filter(|symbol| !symbol.is_ascii_digit())
        .collect()
}

fn head(text: &str) -> String {
    let mut lines: Vec<_> = text.lines().take(SHOWN_LINES).map(shortened).collect();
    if text.lines().count() > SHOWN_LINES {
        lines.push("…".into());
    }
    lines.join("\n")
}

fn shortened(line: &str) -> Cow<'_, str> {
    match line.char_indices().nth(SHOWN_CHARACTERS) {
        None => line.into(),
        Some((end, _)) => format!("{}… ({} bytes)", &line[..end], line.len()).into(),
    }
}

/// Both texts without their common first and last lines, marked with whose each line is.
fn unequal_lines(etcd: &str, ours: &str) -> Vec<String> {
    let (left, right): (Vec<&str>, Vec<&str>) = (etcd.lines().collect(), ours.lines().collect());
    let same = |pair: &(&&str, &&str)| pair.0 == pair.1;
    let first = left.iter().zip(&right).take_while(same).count();
    let rest = left.len().min(right.len()) - first;
    let last = left
        .iter()
        .rev()
        .zip(right.iter().rev())
        .take(rest)
        .take_while(same)
        .count();
    // A few lines before say where in the answer it is.
    let context = first.saturating_sub(6);
    let mut shown: Vec<String> = left[context..first]
        .iter()
        .map(|line| format!("            {line}"))
        .collect();
    for (name, lines) in [("etcd", &left), ("ours", &right)] {
        let middle = &lines[first..lines.len() - last];
        shown.extend(
            middle
                .iter()
                .take(SHOWN_LINES)
                .map(|line| format!("{name:<11} {line}")),
        );
        if middle.is_empty() {
            shown.push(format!("{name:<11} (nothing)"));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_values_are_cut() {
        let line = format!("value: b\"{}\"", "x".repeat(20_000));
        let short = shortened(&line);
        assert!(short.len() < SHOWN_CHARACTERS + 40, "{short}");
        assert!(
            short.ends_with(&format!("({} bytes)", line.len())),
            "{short}"
        );
        assert_eq!(shortened("short"), "short");
    }

    #[test]
    fn only_what_differs_is_shown_with_whose_it_is() {
        let shown = unequal_lines("a\nb\nc\nd", "a\nx\nd");
        assert_eq!(
            shown,
            [
                "            a",
                "etcd        b",
                "etcd        c",
                "ours        x"
            ]
        );
        assert_eq!(
            unequal_lines("a\na", "a"),
            ["            a", "etcd        a", "ours        (nothing)"]
        );
    }
}
