//! Log set-up: filter from the environment, text or JSON, to standard error.

use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Environment variable that holds the filter, in `tracing`'s directive syntax.
pub const LOG_FILTER_VARIABLE: &str = "CLUSTERMESH_LOG";

/// Filter when the variable is absent. openraft warns of every attempt to reach a replica that is down, many times a second, and
/// calls a replica's ordinary end an error where a stream of entries is open; what people must know of both is said elsewhere.
pub const DEFAULT_LOG_FILTER: &str =
    "info,openraft=error,openraft::raft::stream_append=off,h2=warn,hyper=warn,rustls=warn";

/// How a log line is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

impl FromStr for LogFormat {
    type Err = LoggingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(LoggingError::Format(other.to_owned())),
        }
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The format is unknown.
    #[error("log format {0:?} is not known; use \"text\" or \"json\"")]
    Format(String),
    /// The filter cannot be parsed.
    #[error("{LOG_FILTER_VARIABLE}={filter:?} is not a log filter: {reason}")]
    Filter {
        /// The text that was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Something else in this process has set up logging already.
    #[error("logging is set up already")]
    AlreadySet,
}

/// Sends log events to standard error in `format`, filtered by [`LOG_FILTER_VARIABLE`].
///
/// # Errors
/// When the filter does not parse or logging was set up before.
pub fn init(format: LogFormat) -> Result<(), LoggingError> {
    let text = std::env::var(LOG_FILTER_VARIABLE).unwrap_or_else(|_| DEFAULT_LOG_FILTER.to_owned());
    let filter = parse_filter(&text)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(BoxMakeWriter::new(std::io::stderr));
    let outcome = match format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    outcome.map_err(|_| LoggingError::AlreadySet)
}

fn parse_filter(text: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::try_new(text).map_err(|error| LoggingError::Filter {
        filter: text.to_owned(),
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_named_text_and_json() {
        assert_eq!("text".parse::<LogFormat>().unwrap(), LogFormat::Text);
        assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
        assert!(
            "yaml"
                .parse::<LogFormat>()
                .unwrap_err()
                .to_string()
                .contains("yaml")
        );
    }

    #[test]
    fn a_bad_filter_is_named_with_its_variable() {
        let error = parse_filter("info,a=b=c").unwrap_err().to_string();
        assert!(error.contains(LOG_FILTER_VARIABLE), "{error}");
        assert!(parse_filter(DEFAULT_LOG_FILTER).is_ok());
    }
}
