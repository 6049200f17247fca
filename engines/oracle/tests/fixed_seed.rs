//! A run of the oracle that is the same every time.

use bivisor_oracle::Oracle;

#[test]
fn the_interpreter_agrees_with_the_host() {
    let mut reports = Vec::new();
    let mut oracle = Oracle::new(20_240_601).expect("the oracle starts");
    let tried = oracle
        .run(
            100_000,
            |difference| {
                reports.push(difference.report);
                reports.len() < 5
            },
            |_| {},
        )
        .expect("the native process lives");
    assert!(reports.is_empty(), "{}", reports.join("\n"));
    assert!(tried >= 100_000);
    assert!(oracle.tried() > 1500, "only {} kinds of instruction", oracle.tried());
}
