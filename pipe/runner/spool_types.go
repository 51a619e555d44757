package runner

import "golang.org/x/sys/unix"

// errNoDevice is what reading a control group's file gives once the group
// was removed.
const errNoDevice = unix.ENODEV

// A marker says that a job was started, or was about to be.
type marker struct {
	Boot   string `json:"boot"`
	Slot   int    `json:"slot"`
	User   string `json:"user,omitempty"`
	Uptime int64  `json:"uptime_ns"`
}
