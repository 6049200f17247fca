//! Software engines: they need no virtualization hardware and no privilege.
