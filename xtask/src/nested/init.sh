#!/bin/busybox sh
# The first program of the Linux that has a KVM: does what is typed, a line at a time, and tells each line's status.
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
stty -echo
for module in irqbypass kvm kvm-amd; do insmod "/modules/$module.ko" || echo "no module $module"; done
echo outer-ready
while read -r line; do
    eval "$line"
    echo "outer-status $?"
done
