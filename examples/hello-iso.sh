#!/bin/bash
# The smallest job that makes something bootable: an ISO image with a Linux
# kernel and one program, which says hello and switches the machine off.
#
# Drop this file into jobs/. A few seconds later hello.iso lies in
# output/hello-iso/latest/. Try it:
#   qemu-system-x86_64 -m 256 -cdrom hello.iso -serial stdio
# or write it to a USB stick: it is a hybrid image, for BIOS machines.
#
# How a job works: it runs inside the builder VM as a user without any rights,
# in an empty folder of its own. What it prints is shown in the log; what it
# leaves in the folder $OUT is delivered; its exit code says whether it worked.
# This one needs the Debian flavour of the VM (VM_FLAVOUR=debian) and no network.
set -euo pipefail
: "${OUT:?the folder for the results: the builder VM sets it}"

# 1. The initramfs: the file system in memory that the kernel starts from. One
#    static binary, busybox, serves as every command.
echo "Making the initramfs"
mkdir -p root/bin root/dev root/proc root/sys
cp /usr/bin/busybox root/bin/busybox

# /init is the first program that the kernel starts.
cat >root/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
# To both consoles: the serial line and the screen.
for console in /dev/ttyS0 /dev/tty0; do
  echo "OSBUILDER HELLO: this image boots" >"$console"
done 2>/dev/null
/bin/busybox sleep 3
/bin/busybox poweroff -f
INIT
chmod 755 root/init
(cd root && find . | cpio --quiet -o -H newc -R 0:0) | gzip -9 >initrd.gz

# 2. The contents of the ISO: the kernel (the builder VM's own will do), the
#    initramfs, and the boot loader isolinux with its configuration.
echo "Gathering kernel and boot loader"
mkdir -p iso/isolinux
cp /run/osbuilder/iso/live/vmlinuz iso/vmlinuz
cp initrd.gz iso/initrd.gz
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 iso/isolinux/
# no_timer_check: on an emulated machine, its timer's ticks may come late; the
# kernel would take that for a fault and stop.
cat >iso/isolinux/isolinux.cfg <<'CONFIG'
serial 0 115200
default hello
prompt 0
label hello
  kernel /vmlinuz
  append initrd=/initrd.gz console=tty0 console=ttyS0,115200 quiet no_timer_check
CONFIG

# 3. The ISO itself. -isohybrid-mbr makes it bootable from a stick, too.
echo "Writing hello.iso"
xorriso -as mkisofs -quiet -V HELLO -R \
  -b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4 -boot-info-table \
  -isohybrid-mbr /usr/lib/ISOLINUX/isohdpfx.bin \
  -o "$OUT/hello.iso" iso 2>xorriso.log || {
  cat xorriso.log >&2
  exit 1
}
echo "Done: hello.iso, $(stat -c %s "$OUT/hello.iso") bytes"
