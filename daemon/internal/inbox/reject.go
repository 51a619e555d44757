package inbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

const (
	maxName    = 255 // bytes in a name, on nearly every file system
	maxNumber  = 100_000
	messageExt = ".txt"
)

// reject moves a drop to the rejected folder, with a message beside it. The
// message goes first: stopped between the two, the next start finds it and
// moves the drop to it.
func (b *Inbox) reject(name string, s stamp, why *refusal) error {
	message := fmt.Appendf(nil, "%s was not taken as a job: %v.\n", quote(name), why)
	for _, h := range hint.Of(why) {
		message = fmt.Appendf(message, "%s\n", h)
	}
	message = append(message, "Then put it into the jobs folder again.\n"...)

	stays := func(err error) error {
		what := "drop rejected, but it can't be moved away; it stays until it changes"
		if disk.Full(err) {
			what = "drop rejected, but it can't be moved away yet, trying again"
		}
		return &stuck{what, fmt.Errorf("%w; it stays because: %w", why, b.unmovable(name, err)), disk.Full(err)}
	}
	dir := filepath.Join(b.cfg.Dir, rejectedDir)
	if err := disk.MkdirAll(dir, 0o755); err != nil {
		return stays(err)
	}
	to, err := place(dir, name, message)
	if err != nil {
		return stays(err)
	}
	if err := writeMessage(to+messageExt, message); err != nil {
		_ = effect.Remove(to + messageExt) // half of it, or nothing
		return stays(err)
	}
	b.did("message written")
	from := filepath.Join(b.cfg.Dir, name)
	if now, err := stampOf(from); err != nil || now != s {
		_ = effect.Remove(to + messageExt) // about a drop that is gone; at worst it stays
		if err != nil {
			return err
		}
		return errChanged
	}
	if err := disk.MoveNew(from, to); err != nil {
		_ = effect.Remove(to + messageExt) // the log says the same
		return stays(err)
	}
	b.did("rejected")
	for _, d := range []string{dir, b.cfg.Dir} {
		if err := disk.SyncDir(d); err != nil {
			b.log.Debug("move of a drop not synced", zap.String("drop", name), zap.Error(err))
		}
	}
	b.log.Warn("drop rejected", append(b.about(name, why), zap.String("moved_to", filepath.Join(rejectedDir, filepath.Base(to))))...)
	return nil
}

// place returns a free path in dir for the drop. One is free, too, if only
// this very message, or its beginning, lies beside it.
func place(dir, name string, message []byte) (string, error) {
	for n := 1; n < maxNumber; n++ {
		number := ""
		if n > 1 {
			number = fmt.Sprintf("-%d", n)
		}
		to := filepath.Join(dir, cut(name, maxName-len(number)-len(messageExt))+number)
		if _, err := os.Lstat(to); err == nil {
			continue
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		there, err := os.ReadFile(to + messageExt)
		if err == nil && bytes.HasPrefix(message, there) || errors.Is(err, fs.ErrNotExist) {
			return to, nil
		}
	}
	return "", fmt.Errorf("%s holds too many drops of that name; remove some", dir)
}

// cut shortens a name to n bytes, between two characters.
func cut(name string, n int) string {
	if len(name) <= n {
		return name
	}
	for n > 0 && !utf8.RuneStart(name[n]) {
		n--
	}
	return name[:n]
}

func writeMessage(path string, message []byte) error {
	f, err := effect.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(message); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	return f.Sync()
}

// quote writes a name so that it stays on one line, plain where it can be.
func quote(name string) string {
	q := fmt.Sprintf("%q", name)
	if q == `"`+name+`"` && !strings.ContainsAny(name, " ") {
		return name
	}
	return q
}

// shellQuote makes one word of a path for a shell, of what a log and a terminal
// show as it stands: Bash and its like read the rest as numbers. It is no
// option of the program that gets it.
func shellQuote(path string) string {
	if strings.HasPrefix(path, "-") {
		path = "./" + path
	}
	if path != "" && strings.Trim(path, bare) == "" {
		return path
	}
	if !strings.ContainsFunc(path, hard) {
		return "'" + strings.ReplaceAll(path, "'", `'\''`) + "'"
	}
	var b strings.Builder
	for len(path) > 0 {
		r, n := utf8.DecodeRuneInString(path)
		if char := path[:n]; hard(r) || r == '\\' || r == '\'' {
			for i := range n {
				fmt.Fprintf(&b, `\%03o`, char[i])
			}
		} else {
			b.WriteString(char)
		}
		path = path[n:]
	}
	return "$'" + b.String() + "'"
}

// bare are the characters that mean nothing to any shell.
const bare = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./@%+,:-"

// hard is what a log or a terminal shows as something else: for the log that
// goes for quotes, too, in which it sets a hint.
func hard(r rune) bool { return r == utf8.RuneError || r == '"' || !unicode.IsPrint(r) }
