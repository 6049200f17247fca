//! Rate limits: token buckets for bytes and operations per second, for disks and networks.

use std::time::{Duration, Instant};

/// How long a bucket takes to fill: a second's worth may go at once after a pause.
const BURST: Duration = Duration::from_secs(1);

/// What a device may do per second; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes per second.
    pub bytes: Option<u64>,
    /// Operations per second.
    pub operations: Option<u64>,
}

impl RateLimit {
    /// Nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.bytes.is_none() && self.operations.is_none()
    }
}

/// Tokens that come back with time. Something larger than the bucket passes when the bucket is full, and leaves a
/// debt.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    tokens: f64,
}

impl Bucket {
    fn new(per_second: u64) -> Self {
        let per_second = per_second.max(1) as f64;
        Self { per_second, tokens: per_second * BURST.as_secs_f64() }
    }

    fn refill(&mut self, passed: Duration) {
        let full = self.per_second * BURST.as_secs_f64();
        self.tokens = (self.tokens + self.per_second * passed.as_secs_f64()).min(full);
    }

    /// Time until `count` tokens may be taken.
    fn wait(&self, count: f64) -> Duration {
        let full = self.per_second * BURST.as_secs_f64();
        let missing = count.min(full) - self.tokens;
        Duration::try_from_secs_f64(missing / self.per_second).unwrap_or(Duration::ZERO)
    }
}

/// Keeps one device to its limit.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    filled: Instant,
}

impl RateLimiter {
    /// A limiter whose buckets are full at `now`.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            bytes: limit.bytes.map(Bucket::new),
            operations: limit.operations.map(Bucket::new),
            filled: now,
        }
    }

    /// Takes the tokens for one operation of so many bytes.
    ///
    /// # Errors
    /// The time to wait before asking again, if the operation must wait; then nothing is taken.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        let mut wait = Duration::ZERO;
        let mut wanted = [(&mut self.bytes, bytes as f64), (&mut self.operations, 1.0)];
        for (bucket, count) in &mut wanted {
            if let Some(bucket) = bucket {
                bucket.refill(passed);
                wait = wait.max(bucket.wait(*count));
            }
        }
        if !wait.is_zero() {
            return Err(wait);
        }
        for (bucket, count) in &mut wanted {
            if let Some(bucket) = bucket {
                bucket.tokens -= *count;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much passes within `seconds` when operations of `bytes` come as fast as they may.
    fn passed(limit: RateLimit, bytes: u64, seconds: u64) -> (u64, u64) {
        let start = Instant::now();
        let (mut now, end) = (start, start + Duration::from_secs(seconds));
        let mut limiter = RateLimiter::new(limit, start);
        let mut count = 0;
        while now < end {
            match limiter.take(bytes, now) {
                Ok(()) => count += 1,
                Err(wait) => now += wait.max(Duration::from_micros(1)),
            }
        }
        (count, count * bytes)
    }

    #[test]
    fn each_limit_holds_after_the_first_burst() {
        let operations = RateLimit { bytes: None, operations: Some(100) };
        let (count, _) = passed(operations, 1 << 20, 10);
        assert!((1090..=1110).contains(&count), "{count}");
        let bytes = RateLimit { bytes: Some(1 << 20), operations: None };
        let (_, total) = passed(bytes, 4096, 10);
        assert!((total as f64 / (11.0 * f64::from(1 << 20)) - 1.0).abs() < 0.01, "{total}");
        let both = RateLimit { bytes: Some(1 << 20), operations: Some(10) };
        assert!((109..=111).contains(&passed(both, 512, 10).0));
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_at_the_rate() {
        let limit = RateLimit { bytes: Some(1 << 20), operations: None };
        let (count, _) = passed(limit, 4 << 20, 40);
        assert!((10..=11).contains(&count), "{count}");
    }

    #[test]
    fn without_a_limit_nothing_waits_and_time_may_stand_still() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(RateLimit::default(), now);
        for _ in 0..1000 {
            assert_eq!(limiter.take(u64::MAX, now), Ok(()));
        }
        assert!(RateLimit::default().is_unlimited());
        let mut limiter = RateLimiter::new(RateLimit { bytes: Some(1), operations: None }, now);
        assert_eq!(limiter.take(1, now), Ok(()));
        assert!(limiter.take(1, now).is_err_and(|wait| wait == Duration::from_secs(1)));
    }
}
