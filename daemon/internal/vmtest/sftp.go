package vmtest

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Packet types and status codes of SFTP version 3, draft-ietf-secsh-filexfer-02.
const (
	fxpInit     = 1
	fxpVersion  = 2
	fxpOpen     = 3
	fxpClose    = 4
	fxpRead     = 5
	fxpWrite    = 6
	fxpLstat    = 7
	fxpFstat    = 8
	fxpSetstat  = 9
	fxpFsetstat = 10
	fxpOpendir  = 11
	fxpReaddir  = 12
	fxpRemove   = 13
	fxpRealpath = 16
	fxpStat     = 17
	fxpStatus   = 101
	fxpHandle   = 102
	fxpData     = 103
	fxpName     = 104
	fxpAttrs    = 105
	fxpExtended = 200
	fxpReply    = 201

	fxOK          = 0
	fxEOF         = 1
	fxNoSuchFile  = 2
	fxPermission  = 3
	fxFailure     = 4
	fxUnsupported = 8

	posixRename = "posix-rename@openssh.com"
	fsync       = "fsync@openssh.com"
	statvfs     = "statvfs@openssh.com"

	openSSHMaxRead = 261120 // sftp-server.c: SFTP_MAX_MSG_LENGTH less 1 KiB
	maxPacket      = 256 << 10
)

var kinds = map[byte]string{
	fxpOpen: "open", fxpClose: "close", fxpRead: "read", fxpWrite: "write", fxpLstat: "lstat",
	fxpFstat: "fstat", fxpSetstat: "setstat", fxpFsetstat: "fsetstat", fxpOpendir: "opendir",
	fxpReaddir: "readdir", fxpRemove: "remove", fxpRealpath: "realpath", fxpStat: "stat",
}

// An sftpServer serves one session. Like OpenSSH's it answers one request
// after the other, in their order, and clips long reads without a word. It is
// not the one of pkg/sftp, which knows no fsync and would share its
// misunderstandings with the client under test.
type sftpServer struct {
	s       *Server
	channel io.ReadWriter
	gone    <-chan struct{}
	handles map[string]*handle
	next    int
	written int64 // by this session
}

type handle struct {
	file   *os.File
	path   string
	listed bool
}

func newSFTP(s *Server, channel io.ReadWriter, gone <-chan struct{}) *sftpServer {
	return &sftpServer{s: s, channel: channel, gone: gone, handles: map[string]*handle{}}
}

func (v *sftpServer) serve() {
	defer func() {
		for _, h := range v.handles {
			h.file.Close()
		}
	}()
	for {
		var head [4]byte
		if _, err := io.ReadFull(v.channel, head[:]); err != nil {
			return
		}
		size := binary.BigEndian.Uint32(head[:])
		if size < 1 || size > maxPacket {
			return // OpenSSH ends with "bad message"
		}
		packet := make([]byte, size)
		if _, err := io.ReadFull(v.channel, packet); err != nil {
			return
		}
		answer := v.answer(packet[0], &decoder{b: packet[1:]})
		if answer == nil {
			return
		}
		out := binary.BigEndian.AppendUint32(nil, uint32(len(answer)))
		if _, err := v.channel.Write(append(out, answer...)); err != nil {
			return
		}
	}
}

// answer carries out one request. nil ends the session.
func (v *sftpServer) answer(kind byte, d *decoder) []byte {
	faults, _ := v.s.now()
	id := d.uint32()
	if kind == fxpInit {
		e := encoder{fxpVersion}.uint32(3).string(statvfs).string("2")
		if !faults.NoPosixRename {
			e = e.string(posixRename).string("1")
		}
		if !faults.NoFsync {
			e = e.string(fsync).string("1")
		}
		return e
	}
	if kind != fxpExtended {
		v.s.count(kinds[kind])
	}
	switch kind {
	case fxpOpen:
		return v.open(id, d)
	case fxpOpendir:
		name := d.string()
		f, err := os.Open(name)
		return v.handle(id, f, name, err)
	case fxpRealpath:
		name, err := filepath.Abs(d.string())
		if err != nil {
			return status(id, err)
		}
		return encoder{fxpName}.uint32(id).uint32(1).string(name).string(name).uint32(0)
	case fxpRemove:
		return status(id, os.Remove(d.string()))
	case fxpStat:
		info, err := os.Stat(d.string())
		return attrs(id, info, err)
	case fxpLstat:
		info, err := os.Lstat(d.string())
		return attrs(id, info, err)
	case fxpSetstat:
		name := d.string()
		return status(id, setstat(d, func(m fs.FileMode) error { return os.Chmod(name, m) }, func(n int64) error { return os.Truncate(name, n) }))
	case fxpExtended:
		return v.extended(id, d, faults)
	}
	name := d.string()
	h := v.handles[name]
	if h == nil {
		return status(id, errors.New("unknown handle or request"))
	}
	switch kind {
	case fxpClose:
		delete(v.handles, name)
		return status(id, h.file.Close())
	case fxpRead:
		return v.read(id, h, d, faults)
	case fxpWrite:
		offset := d.uint64()
		data := d.string()
		if faults.FailWrite || faults.Full {
			_, _ = h.file.WriteAt([]byte(data[:len(data)/2]), int64(offset))
			return status(id, syscall.ENOSPC)
		}
		return v.write(id, h, int64(offset), data, faults)
	case fxpFstat:
		info, err := h.file.Stat()
		return attrs(id, info, err)
	case fxpFsetstat:
		return status(id, setstat(d, h.file.Chmod, h.file.Truncate))
	case fxpReaddir:
		return v.readdir(id, h)
	}
	return encoder{fxpStatus}.uint32(id).uint32(fxUnsupported).string("unsupported").string("")
}

func (v *sftpServer) open(id uint32, d *decoder) []byte {
	name, pflags := d.string(), d.uint32()
	flags := os.O_RDONLY
	switch pflags & 3 { // SSH_FXF_READ, SSH_FXF_WRITE
	case 2:
		flags = os.O_WRONLY
	case 3:
		flags = os.O_RDWR
	}
	for bit, flag := range map[uint32]int{4: os.O_APPEND, 8: os.O_CREATE, 16: os.O_TRUNC, 32: os.O_EXCL} {
		if pflags&bit != 0 {
			flags |= flag
		}
	}
	f, err := os.OpenFile(name, flags, 0o644) // 0666 less the usual umask
	return v.handle(id, f, name, err)
}

func (v *sftpServer) handle(id uint32, f *os.File, name string, err error) []byte {
	if err != nil {
		return status(id, err)
	}
	v.next++
	key := strconv.Itoa(v.next)
	v.handles[key] = &handle{file: f, path: name}
	return encoder{fxpHandle}.uint32(id).string(key)
}

func (v *sftpServer) read(id uint32, h *handle, d *decoder, faults Faults) []byte {
	offset, size := int64(d.uint64()), int64(d.uint32())
	for base := filepath.Base(h.path); ; {
		now, changed := v.s.now()
		if now.StallReads != base {
			break
		}
		select {
		case <-changed:
		case <-v.gone:
			return nil
		}
	}
	limit := int64(faults.MaxRead)
	if limit == 0 {
		limit = openSSHMaxRead
	}
	size = min(size, limit)
	if faults.ShortReads == filepath.Base(h.path) {
		if info, err := h.file.Stat(); err == nil {
			size = max(0, min(size, info.Size()/2-offset))
		}
	}
	if info, err := h.file.Stat(); err == nil && info.Mode().IsRegular() {
		size = max(0, min(size, info.Size()-offset)) // not 256 KiB for each poll
	}
	buf := make([]byte, size)
	n, err := h.file.ReadAt(buf, offset)
	if n == 0 {
		if err == nil {
			err = io.EOF
		}
		return status(id, err)
	}
	return encoder{fxpData}.uint32(id).string(string(buf[:n]))
}

func (v *sftpServer) write(id uint32, h *handle, offset int64, data string, faults Faults) []byte {
	for base := filepath.Base(h.path); ; {
		now, changed := v.s.now()
		if now.StallWrite == "" || !strings.HasPrefix(base, now.StallWrite) {
			break
		}
		select {
		case <-changed:
		case <-v.gone:
			return nil
		}
	}
	if faults.LoseWrites {
		data = data[:max(0, min(int64(len(data)), 1000-offset))]
	}
	if limit := faults.CutWrites; limit > 0 {
		if int64(len(data)) >= limit-v.written {
			_, _ = h.file.WriteAt([]byte(data[:limit-v.written]), offset)
			v.s.Cut()
			return nil
		}
		v.written += int64(len(data))
	}
	_, err := h.file.WriteAt([]byte(data), offset)
	return status(id, err)
}

func (v *sftpServer) readdir(id uint32, h *handle) []byte {
	if h.listed {
		return status(id, io.EOF)
	}
	h.listed = true
	entries, err := h.file.ReadDir(-1)
	if err != nil {
		return status(id, err)
	}
	e := encoder{fxpName}.uint32(id).uint32(uint32(len(entries)))
	for _, entry := range entries {
		info, err := os.Lstat(filepath.Join(h.path, entry.Name()))
		if err != nil { // renamed meanwhile
			e = e.string(entry.Name()).string(entry.Name()).uint32(0)
			continue
		}
		e = e.string(entry.Name()).string(entry.Name()).info(info)
	}
	return e
}

func (v *sftpServer) extended(id uint32, d *decoder, faults Faults) []byte {
	name := d.string()
	v.s.count(name)
	switch {
	case name == posixRename && !faults.NoPosixRename:
		from, to := d.string(), d.string()
		if faults.FailRename {
			return status(id, syscall.EIO)
		}
		if script := v.s.stranger(to); script != "" {
			// What was renamed here is gone before the runner comes to look.
			if err := os.WriteFile(from, []byte(script), 0o600); err != nil {
				return status(id, err)
			}
		}
		return status(id, os.Rename(from, to))
	case name == statvfs:
		return v.statvfs(id, d.string(), faults)
	case name == fsync && !faults.NoFsync:
		h := v.handles[d.string()]
		if h == nil || faults.FailFsync {
			return status(id, syscall.EIO)
		}
		return status(id, h.file.Sync())
	}
	return encoder{fxpStatus}.uint32(id).uint32(fxUnsupported).string("unsupported").string("")
}

func (v *sftpServer) statvfs(id uint32, name string, faults Faults) []byte {
	var s syscall.Statfs_t
	if err := syscall.Statfs(name, &s); err != nil {
		return status(id, err)
	}
	if faults.Full {
		s.Bfree, s.Bavail = 0, 0
	}
	e := encoder{fxpReply}.uint32(id)
	for _, n := range []uint64{
		uint64(s.Bsize), uint64(s.Frsize), s.Blocks, s.Bfree, s.Bavail, s.Files, s.Ffree, s.Ffree, 0, 0, uint64(s.Namelen),
	} {
		e = e.uint64(n)
	}
	return e
}

// setstat takes the size or the mode out of a request's attributes and nothing
// else.
func setstat(d *decoder, chmod func(fs.FileMode) error, truncate func(int64) error) error {
	switch flags := d.uint32(); flags {
	case 1: // SSH_FILEXFER_ATTR_SIZE
		return truncate(int64(d.uint64()))
	case 4: // SSH_FILEXFER_ATTR_PERMISSIONS
		return chmod(fs.FileMode(d.uint32()).Perm())
	default:
		return errors.New("only sizes and modes can be set here")
	}
}

func status(id uint32, err error) []byte {
	code, text := uint32(fxOK), "Success"
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		code, text = fxEOF, "End of file"
	case errors.Is(err, fs.ErrNotExist):
		code, text = fxNoSuchFile, "No such file"
	case errors.Is(err, fs.ErrPermission):
		code, text = fxPermission, "Permission denied"
	default:
		code, text = fxFailure, "Failure"
	}
	return encoder{fxpStatus}.uint32(id).uint32(code).string(text).string("")
}

func attrs(id uint32, info fs.FileInfo, err error) []byte {
	if err != nil {
		return status(id, err)
	}
	return encoder{fxpAttrs}.uint32(id).info(info)
}

type encoder []byte

func (e encoder) uint32(n uint32) encoder { return binary.BigEndian.AppendUint32(e, n) }
func (e encoder) uint64(n uint64) encoder { return binary.BigEndian.AppendUint64(e, n) }
func (e encoder) string(s string) encoder { return append(e.uint32(uint32(len(s))), s...) }

// info appends a file's attributes: size, mode and times.
func (e encoder) info(info fs.FileInfo) encoder {
	mode := uint32(info.Mode().Perm())
	switch {
	case info.IsDir():
		mode |= syscall.S_IFDIR
	case info.Mode()&fs.ModeSymlink != 0:
		mode |= syscall.S_IFLNK
	default:
		mode |= syscall.S_IFREG
	}
	mtime := uint32(info.ModTime().Unix())
	return e.uint32(1 | 4 | 8).uint64(uint64(info.Size())).uint32(mode).uint32(mtime).uint32(mtime)
}

// A decoder reads a request. Behind its end everything is zero, so that a
// broken request gets an error for an answer.
type decoder struct{ b []byte }

func (d *decoder) uint32() uint32 {
	if len(d.b) < 4 {
		d.b = nil
		return 0
	}
	n := binary.BigEndian.Uint32(d.b)
	d.b = d.b[4:]
	return n
}

func (d *decoder) uint64() uint64 { return uint64(d.uint32())<<32 | uint64(d.uint32()) }

func (d *decoder) string() string {
	n := int(d.uint32())
	if n > len(d.b) {
		d.b = nil
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}
