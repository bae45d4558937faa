//! Rows of the demo: what was checked, what was measured, whether it passed.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::bench::compare::{Figure, Named, Target, alone};

/// What a check that passed has to show.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// All of it, for people.
    pub text: String,
    /// The one number that tells the most, and its unit.
    pub number: Option<(f64, &'static str)>,
}

impl Measured {
    /// A check with a number.
    #[must_use]
    pub const fn new(number: f64, unit: &'static str, text: String) -> Self {
        Self {
            text,
            number: Some((number, unit)),
        }
    }

    /// A check that ends in a plain statement.
    #[must_use]
    pub const fn statement(text: String) -> Self {
        Self { text, number: None }
    }
}

/// One checked statement; written with the fields of every other figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Name, statement and number; the only goal is that the statement holds.
    #[serde(flatten)]
    pub figure: Figure,
    /// What was measured, or why the row failed.
    pub measured: String,
    /// Whether the statement held.
    pub passed: bool,
}

impl Row {
    /// The row of a check that has ended.
    pub fn new(id: &str, row: &str, outcome: Result<Measured>) -> Self {
        let passed = outcome.is_ok();
        let measured = outcome.unwrap_or_else(|error| Measured::statement(format!("{error:#}")));
        let (values, unit) = match measured.number {
            Some((number, unit)) => (vec![number], unit),
            None => (Vec::new(), ""),
        };
        Self {
            figure: Figure {
                met: passed,
                ..alone(Named { id, row, unit }, &values, Target::Report)
            },
            measured: measured.text,
            passed,
        }
    }
}

/// Prints the rows as a table and tells whether all passed.
pub fn print_table(rows: &[Row]) -> bool {
    let width = rows.iter().map(|row| row.figure.row.len()).max();
    let width = width.unwrap_or(0);
    println!();
    for row in rows {
        let mark = if row.passed { "ok  " } else { "FAIL" };
        println!("{mark} {:width$}  {}", row.figure.row, row.measured);
    }
    let passed = rows.iter().filter(|row| row.passed).count();
    println!("\n{passed} of {} rows passed", rows.len());
    passed == rows.len()
}

/// Writes the rows to `bench-results/NAME.json`.
///
/// # Errors
/// When the folder or the file cannot be written.
pub fn write_json(folder: &Path, name: &str, rows: &impl Serialize) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(format!("{name}.json"));
    std::fs::write(&path, serde_json::to_vec_pretty(rows)?)
        .with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_fields_of_figures_and_a_number_where_one_was_measured() {
        let timed = Measured::new(4.5, "ms", "took 4.5 ms".to_owned());
        let rows = [
            Row::new("a", "it is quick", Ok(timed)),
            Row::new("b", "it is so", Ok(Measured::statement("so".to_owned()))),
            Row::new("c", "it is not", Err(anyhow::anyhow!("broken"))),
        ];
        let json = serde_json::json!(rows);
        for field in
            "id row unit ours peer peer_name ratio target met runs spread passed".split(' ')
        {
            assert!(json[0].get(field).is_some(), "{field}: {json}");
        }
        assert_eq!(json[0]["ours"], 4.5);
        assert_eq!(json[0]["unit"], "ms");
        assert_eq!(json[1]["ours"], serde_json::Value::Null);
        assert_eq!(json[1]["passed"], true);
        assert_eq!(json[2]["met"], false);
        assert_eq!(json[2]["measured"], "broken");
    }
}
