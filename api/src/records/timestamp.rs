//! Heartbeats and canaries: a time as text that nobody parses; that it was written is the message.

use bytes::Bytes;

use super::error::DecodeError;

/// RFC 3339 text, as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timestamp(pub String);

impl Timestamp {
    /// The time in UTC, whole seconds. Years beyond 9999 are written with more digits.
    #[must_use]
    pub fn from_unix_ms(unix_ms: i64) -> Self {
        let seconds = unix_ms.div_euclid(1000);
        let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = civil_from_days(days);
        let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
        Self(format!(
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        ))
    }

    /// Takes any text.
    ///
    /// # Errors
    /// The bytes are not UTF-8.
    pub fn decode(value: &[u8]) -> Result<Self, DecodeError> {
        let text = std::str::from_utf8(value).map_err(|_| DecodeError::NotUtf8)?;
        Ok(Self(text.to_owned()))
    }

    /// The bytes to store.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        Bytes::from(self.0.clone())
    }
}

/// Year, month and day of a day count since 1970, in the proleptic Gregorian calendar: years are counted from March,
/// so that the leap day comes last, in eras of 400 years.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    const DAYS_PER_ERA: i64 = 146_097;
    const DAYS_0000_03_01_TO_1970: i64 = 719_468;
    let days = days + DAYS_0000_03_01_TO_1970;
    let era = days.div_euclid(DAYS_PER_ERA);
    let day_of_era = days.rem_euclid(DAYS_PER_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}
