//! Measures the small guest by which the engine kvm is judged, whatever it takes up to ten seconds.
use std::time::Duration;

fn main() {
    match bivisor_kvm::probe::measure(Duration::from_secs(10)) {
        Ok(time) => println!("{time:?}"),
        Err(error) => println!("{error}"),
    }
}
