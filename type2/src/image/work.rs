//! The making of an image: a lock, a folder beside the images that goes on every way out, programs that are told to
//! end when we are, and the step by which a finished image takes its name.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::{ImageError, io_error};
use crate::host::signals::{self, Watch};
use crate::status;

/// What the names of folders begin with in which images are made.
const WORK_PREFIX: &str = ".build-";
/// How long a program may take to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(10);

/// The making of one image.
pub(super) struct Work {
    images: PathBuf,
    folder: tempfile::TempDir,
    running: Arc<Running>,
    _watch: Watch,
    _lock: File,
}

/// What the thread that hears signals must know.
#[derive(Default)]
struct Running {
    /// The program that runs now, or 0.
    child: AtomicI32,
    /// We have been told to end.
    ending: AtomicBool,
}

impl Work {
    /// Begins to make an image in a folder of images; waits for others that do.
    pub(super) fn start(images: PathBuf) -> Result<Self, ImageError> {
        fs::create_dir_all(&images).map_err(io_error("making folder", &images))?;
        let lock_file = images.join(".lock");
        let lock = File::create(&lock_file).map_err(io_error("opening", &lock_file))?;
        lock.lock().map_err(io_error("locking", &lock_file))?;
        // On every way out, the temporary folder goes; SIGKILL's goes here, as nobody else holds the lock.
        remove_leftovers(&images);
        let folder = tempfile::Builder::new()
            .prefix(WORK_PREFIX)
            .tempdir_in(&images)
            .map_err(io_error("making a folder in", &images))?;
        let leftover = folder.path().to_owned();
        let running = Arc::new(Running::default());
        let heard = running.clone();
        let watch = signals::watch(move |signal| {
            heard.ending.store(true, Ordering::SeqCst);
            end_child(heard.child.load(Ordering::SeqCst));
            // Our death is the better part of what is left to do.
            let _ = fs::remove_dir_all(&leftover);
            std::process::exit(status::of_signal(signal).into());
        })
        .map_err(io_error("watching for signals while making", &images))?;
        Ok(Self { images, folder, running, _watch: watch, _lock: lock })
    }

    /// The folder, gone at the end.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The folder that is to become the image.
    pub(super) fn image(&self) -> Result<PathBuf, ImageError> {
        let image = self.path().join("image");
        fs::create_dir(&image).map_err(io_error("making folder", &image))?;
        Ok(image)
    }

    /// Gives the finished image its name.
    pub(super) fn finish(self, name: &str) -> Result<(), ImageError> {
        replace(&self.path().join("image"), &self.images.join(name), self.path())
    }

    /// Runs a program to its end, showing what it does, and returns the last lines that it wrote on standard error.
    pub(super) fn run(
        &self,
        command: &mut Command,
        bar: &ProgressBar,
    ) -> io::Result<(ExitStatus, Vec<String>)> {
        const KEPT: usize = 20;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.env("LC_ALL", "C.UTF-8").spawn()?;
        self.running.child.store(child.id().cast_signed(), Ordering::SeqCst);
        let mut lines = Vec::new();
        // Programs that draw bars end their lines with a carriage return.
        for line in child.stderr.take().into_iter().flat_map(|e| BufReader::new(e).split(b'\n')) {
            let line = String::from_utf8_lossy(&line?).into_owned();
            let line = line.trim().rsplit('\r').next().unwrap_or_default().to_owned();
            if let Some(doing) = line.strip_prefix("I: ") {
                bar.set_message(doing.trim_end_matches('.').to_owned());
            }
            if !line.is_empty() {
                lines.push(line);
                lines.drain(..lines.len().saturating_sub(KEPT));
            }
        }
        let status = child.wait()?;
        self.running.child.store(0, Ordering::SeqCst);
        while self.running.ending.load(Ordering::SeqCst) {
            // The thread that heard the signal ends the process; why the program failed is nobody's concern.
            thread::park();
        }
        Ok((status, lines))
    }
}

/// Ends a program of ours and waits for it, so that it can clean up what we can't.
fn end_child(id: i32) {
    let Some(pid) = Pid::from_raw(id) else { return };
    // It may have ended by itself.
    let _ = kill_process(pid, Signal::TERM);
    let pause = Duration::from_millis(50);
    let mut waited = Duration::ZERO;
    while waited < PATIENCE && test_kill_process(pid).is_ok() {
        thread::sleep(pause);
        waited += pause;
    }
}

/// Removes what makers of images left behind that were killed.
fn remove_leftovers(images: &Path) {
    for entry in fs::read_dir(images).into_iter().flatten().filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(WORK_PREFIX) {
            // It costs space only.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A line that tells what is being done.
pub(super) fn step(message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(message);
    bar.set_style(style("{spinner} {msg} {elapsed}"));
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A bar for bytes.
pub(super) fn byte_bar(message: &str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(message.to_owned());
    bar.set_style(style("{msg:36!} {bar:30} {bytes:>10} / {total_bytes} {bytes_per_sec}"));
    bar
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants; a wrong one shows as indicatif's default.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Writes a file and makes sure that it is on the disk.
pub(super) fn write_file(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), ImageError> {
    let write = || {
        let mut writer = BufWriter::new(File::create(path)?);
        fill(&mut writer)?;
        writer.flush()?;
        writer.get_ref().sync_all()
    };
    write().map_err(io_error("writing", path))
}

/// Puts the finished folder in place; the older one, if any, goes with the work folder.
fn replace(new: &Path, place: &Path, work: &Path) -> Result<(), ImageError> {
    if place.exists() {
        let old = work.join("old");
        fs::rename(place, &old).map_err(io_error("moving away", place))?;
        return fs::rename(new, place).map_err(|source| {
            // Better the older image than none; the first error is the one to tell.
            let _ = fs::rename(&old, place);
            io_error("putting in place", place)(source)
        });
    }
    fs::rename(new, place).map_err(io_error("putting in place", place))
}
