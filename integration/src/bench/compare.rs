//! Interleaved rounds, medians and ratios: how every figure is taken and judged.

use serde::Serialize;

/// A goal for a figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// `ours` over `peer` must be at least this.
    RatioAtLeast(f64),
    /// `ours` over `peer` must be at most this.
    RatioAtMost(f64),
    /// `ours` must be at most this, in the row's unit.
    AtMost(f64),
    /// No goal: reported beside another row.
    Report,
}

impl Target {
    fn met(self, ours: f64, ratio: Option<f64>) -> bool {
        match self {
            Self::RatioAtLeast(least) => ratio.is_some_and(|ratio| ratio >= least),
            Self::RatioAtMost(most) => ratio.is_some_and(|ratio| ratio <= most),
            Self::AtMost(most) => ours <= most,
            Self::Report => true,
        }
    }

    fn text(self) -> String {
        match self {
            Self::RatioAtLeast(least) => format!(">= {least}x"),
            Self::RatioAtMost(most) => format!("<= {most}x"),
            Self::AtMost(most) => format!("<= {most}"),
            Self::Report => "-".to_owned(),
        }
    }
}

/// A row of the results: a median of `runs` rounds against a peer of the same rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Stable name.
    pub id: String,
    /// What was measured.
    pub row: String,
    /// Unit of `ours` and `peer`.
    pub unit: String,
    /// Median of ours, where a number was measured.
    pub ours: Option<f64>,
    /// Median of the peer's, where there is one.
    pub peer: Option<f64>,
    /// Who the peer is.
    pub peer_name: String,
    /// `ours` over `peer`.
    pub ratio: Option<f64>,
    /// The goal.
    pub target: String,
    /// Whether it was reached.
    pub met: bool,
    /// Rounds.
    pub runs: usize,
    /// Smallest and largest of ours.
    pub spread: Option<[f64; 2]>,
}

/// Values of one contender, one a round.
pub type Series = Vec<f64>;

/// The middle value; the mean of the two middle ones of an even number; 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// What a figure is called.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    /// Stable name.
    pub id: &'a str,
    /// What was measured.
    pub row: &'a str,
    /// Unit.
    pub unit: &'a str,
}

/// Compares two series of the same rounds.
#[must_use]
pub fn against(
    named: Named<'_>,
    ours: &[f64],
    peer_name: &str,
    peer: &[f64],
    target: Target,
) -> Figure {
    let (our_median, peer_median) = (median(ours), median(peer));
    let ratio = (peer_median > 0.0).then(|| our_median / peer_median);
    figure(named, ours, Some(peer_median), peer_name, ratio, target)
}

/// Judges a series by itself.
#[must_use]
pub fn alone(named: Named<'_>, ours: &[f64], target: Target) -> Figure {
    figure(named, ours, None, "", None, target)
}

fn figure(
    named: Named<'_>,
    ours: &[f64],
    peer: Option<f64>,
    peer_name: &str,
    ratio: Option<f64>,
    target: Target,
) -> Figure {
    let least = ours.iter().copied().fold(f64::INFINITY, f64::min);
    let most = ours.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Figure {
        id: named.id.to_owned(),
        row: named.row.to_owned(),
        unit: named.unit.to_owned(),
        ours: (!ours.is_empty()).then(|| median(ours)),
        peer,
        peer_name: peer_name.to_owned(),
        ratio,
        target: target.text(),
        met: !ours.is_empty() && target.met(median(ours), ratio),
        runs: ours.len(),
        spread: (!ours.is_empty()).then_some([least, most]),
    }
}

/// Prints figures as a table.
pub fn print_table(figures: &[Figure]) {
    println!(
        "{:<16} {:>12} {:>12} {:>7} {:>10} {:<5} {:<10} measured",
        "id", "ours", "peer", "ratio", "target", "met", "unit"
    );
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
    for figure in figures {
        let spread = figure.spread.unwrap_or_default();
        println!(
            "{:<16} {:>12} {:>12} {:>7} {:>10} {:<5} {:<10} {} (median of {}, {:.2} to {:.2}{})",
            figure.id,
            number(figure.ours),
            number(figure.peer),
            figure
                .ratio
                .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
            figure.target,
            if figure.met { "yes" } else { "NO" },
            figure.unit,
            figure.row,
            figure.runs,
            spread[0],
            spread[1],
            if figure.peer_name.is_empty() {
                String::new()
            } else {
                format!("; peer: {}", figure.peer_name)
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMED: Named<'_> = Named {
        id: "x",
        row: "x",
        unit: "s",
    };

    #[test]
    fn medians_of_odd_and_even_numbers() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }

    #[test]
    fn a_figure_without_values_or_below_its_goal_is_not_met() {
        assert!(!alone(NAMED, &[], Target::AtMost(1.0)).met);
        assert!(alone(NAMED, &[0.5], Target::AtMost(1.0)).met);
        assert!(!against(NAMED, &[1.0], "p", &[1.0], Target::RatioAtLeast(1.08)).met);
        assert!(against(NAMED, &[1.1], "p", &[1.0], Target::RatioAtLeast(1.08)).met);
        assert!(!against(NAMED, &[1.1], "p", &[], Target::RatioAtLeast(1.0)).met);
    }
}
