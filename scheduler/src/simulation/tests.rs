//! The first seeds pass, and equal seeds give equal runs.

use super::run;

#[test]
fn equal_seeds_give_equal_runs() {
    assert_eq!(run(7, None), run(7, None));
    assert_ne!(run(7, None), run(8, None));
}

#[test]
fn the_first_seeds_pass_and_do_what_they_should() {
    let reports: Vec<_> = (0..30).map(|seed| run(seed, None)).collect();
    for (seed, report) in reports.iter().enumerate() {
        assert!(
            report.n_requests >= 100 && report.n_faults >= 5,
            "seed {seed}: {report:?}"
        );
    }
    let sum = |of: fn(&super::RunReport) -> u64| reports.iter().map(of).sum::<u64>();
    let (n_requests, n_finished) = (sum(|report| report.n_requests), sum(|report| report.n_finished));
    assert!(
        n_finished * 2 > n_requests,
        "{n_finished} of {n_requests} requests finished"
    );
    assert!(sum(|report| report.n_moves) > 100);
}
