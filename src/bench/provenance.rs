//! What makes a measured number worth keeping: when, by which command, from which commit, on which machine.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use super::report::MachineReport;
use crate::config::Machine;

/// Flags whose values are left out of the reported command line.
const SECRET_FLAGS: [&str; 1] = ["--api-key"];

/// `at` in UTC: `20260131-235959`.
pub fn date(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years are counted from March, so that the leap day is a year's last; 719,468 days lie between 0000-03-01 and 1970.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// The arguments as one could type them, keys left out.
pub fn command(arguments: impl Iterator<Item = String>) -> String {
    let mut hide_next = false;
    let words = arguments.map(|argument| {
        let name = argument.split('=').next().unwrap_or_default();
        let is_secret = SECRET_FLAGS.contains(&name);
        let shown = match (
            std::mem::replace(&mut hide_next, is_secret && argument == name),
            is_secret,
        ) {
            (true, _) => "...".to_owned(),
            (false, true) if argument != name => format!("{name}=..."),
            (false, _) => argument,
        };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:@,+%".contains(c);
        match !shown.is_empty() && shown.chars().all(is_plain) {
            true => shown,
            false => format!("'{}'", shown.replace('\'', r"'\''")),
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The commit checked out in the working directory, marked when there are changes; `None` outside a checkout.
pub fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        String::from_utf8(output.stdout).ok()
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    let mark = if changes.trim().is_empty() { "" } else { "-dirty" };
    Some(format!("{}{mark}", commit.trim()))
}

/// This machine.
pub fn machine() -> MachineReport {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let total_kib =
        field(&read("/proc/meminfo"), "MemTotal").and_then(|total| total.split(' ').next()?.parse::<u64>().ok());
    MachineReport {
        cpu: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        n_cores: Machine::detect().n_cores,
        memory_bytes: total_kib.unwrap_or(0) * 1024,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_right_around_leap_days() {
        for (seconds, expected) in [
            (0, "19700101-000000"),
            (951_782_399, "20000228-235959"),
            (951_782_400, "20000229-000000"),
            (951_868_800, "20000301-000000"),
            (1_709_164_800, "20240229-000000"),
            (4_107_542_400, "21000301-000000"),
            (1_798_761_599, "20261231-235959"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn keys_are_left_out_of_the_command_and_the_rest_can_be_typed() {
        let words = |text: &str| text.split('|').map(str::to_owned).collect::<Vec<_>>().into_iter();
        assert_eq!(
            command(words("baton|bench|--api-key|hunter2|--rate|4")),
            "baton bench --api-key ... --rate 4"
        );
        assert_eq!(
            command(words("baton|--api-key=hunter2|a b|it's|")),
            r"baton --api-key=... 'a b' 'it'\''s' ''"
        );
    }
}
