//! The date for templates that ask for it (`strftime_now`).
//!
//! UTC: the prompt then does not depend on the machine's time zone.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The date in UTC, as 2026-01-31.
pub fn today() -> String {
    // The format has no directive that is unknown.
    strftime(now(), "%Y-%m-%d").unwrap_or_default()
}

/// Formats `seconds` since 1970 as strftime does in the C locale; unknown directives are an error.
pub(super) fn strftime(seconds: u64, format: &str) -> Result<String, String> {
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(days);
    let weekday = DAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[(month - 1) as usize];
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let day_of_year = days - days_before(year) + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // "%-d" is the common extension for a number without padding.
        let pad = directive != Some('-');
        if !pad {
            directive = chars.next();
        }
        let number = |value: u64, width: usize| if pad { format!("{value:0width$}") } else { value.to_string() };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => format!("{day:2}"),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name.chars().take(3).collect(),
            Some('A') => weekday.into(),
            Some('a') => weekday.chars().take(3).collect(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            Some(other) => return Err(format!("strftime_now: directive %{other} is not supported")),
            None => return Err("strftime_now: the format ends in %".into()),
        });
    }
    Ok(out)
}

/// Days from 1970-01-01 to the first of January of `year`.
fn days_before(year: u64) -> u64 {
    let y = year - 1;
    y * 365 + y / 4 - y / 100 + y / 400 - 719_162
}

/// Year, month (1–12) and day (1–31) of a day since 1970, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years here begin in March, so that the leap day is the last one of a 400-year era's years.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (era * 400 + yoe + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        assert_eq!(strftime(0, "%a %d %b %Y %H:%M:%S %j").unwrap(), "Thu 01 Jan 1970 00:00:00 001");
        assert_eq!(strftime(951_827_696, "%A %F %T %p %I %-d").unwrap(), "Tuesday 2000-02-29 12:34:56 PM 12 29");
        assert_eq!(strftime(1_735_689_599, "%d %B %y day %j 100%%").unwrap(), "31 December 24 day 366 100%");
        assert!(strftime(0, "%Q").is_err());
        assert!(strftime(0, "%").is_err());
    }
}
