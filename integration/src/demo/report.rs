//! Rows of the demo: what was checked, what was measured, whether it passed.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One checked statement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Stable name, for machines.
    pub id: &'static str,
    /// What the row states.
    pub row: &'static str,
    /// What was measured, or why the row failed.
    pub measured: String,
    /// Whether the statement held.
    pub passed: bool,
}

/// Prints the rows as a table and tells whether all passed.
pub fn print_table(rows: &[Row]) -> bool {
    let width = rows.iter().map(|row| row.row.len()).max().unwrap_or(0);
    println!();
    for row in rows {
        let mark = if row.passed { "ok  " } else { "FAIL" };
        println!("{mark} {:width$}  {}", row.row, row.measured);
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
