// Package logging writes the daemon's log and the builds' lines to standard
// output: for people or as JSON, without ever making the daemon wait for it.
package logging

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/term"
)

// The forms of the log.
const (
	Console = "console"
	JSON    = "json"
)

// Options say what the log looks like.
type Options struct {
	Format string // Console or JSON
	Level  string // debug, info, warn or error
	Color  bool   // of names and levels; on the console only
}

// New returns a logger and the output that it writes to. Nothing reaches w
// until the output's Run is called.
func New(o Options, w io.Writer) (*zap.Logger, *Output, error) {
	least, err := zapcore.ParseLevel(o.Level)
	if err != nil {
		return nil, nil, fmt.Errorf("log level %q: want debug, info, warn or error", o.Level)
	}
	out := newOutput(w)
	var core zapcore.Core
	switch o.Format {
	case Console:
		core = &consoleCore{LevelEnabler: least, out: out, color: o.Color, names: new(atomic.Int32)}
	case JSON:
		core = zapcore.NewCore(jsonEncoder(), jsonOutput{out}, least)
	default:
		return nil, nil, fmt.Errorf("log format %q: want %s or %s", o.Format, Console, JSON)
	}
	out.notice = func(dropped int) []byte {
		line, err := render(core, dropped)
		if err != nil {
			return fmt.Appendf(nil, "%s dropped=%d\n", droppedMessage, dropped)
		}
		return line
	}
	return zap.New(core, zap.ErrorOutput(out)), out, nil
}

// Last writes the error that ends the program as a line of the JSON log, with
// what to do about it, if that is known. It needs no output that runs: there
// may never have been one.
func Last(w io.Writer, reason error, hint string) error {
	out := newOutput(w)
	log := zap.New(zapcore.NewCore(jsonEncoder(), jsonOutput{out}, zapcore.ErrorLevel))
	if hint != "" {
		log = log.With(zap.String("hint", hint))
	}
	log.Error("the sidecar can't go on", zap.Error(reason))
	stop := make(chan struct{})
	close(stop)
	return out.write(stop)
}

// IsTerminal reports whether w is a terminal.
func IsTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// jsonEncoder names the keys; others may rely on them.
func jsonEncoder() zapcore.Encoder {
	return zapcore.NewJSONEncoder(zapcore.EncoderConfig{
		TimeKey:        "time",
		LevelKey:       "level",
		NameKey:        "logger",
		MessageKey:     "message",
		LineEnding:     "\n",
		EncodeLevel:    zapcore.LowercaseLevelEncoder,
		EncodeTime:     zapcore.RFC3339NanoTimeEncoder,
		EncodeDuration: zapcore.StringDurationEncoder,
	})
}

const (
	lineMessage    = "build output"
	droppedMessage = "log output stalled, lines were dropped"
)

// Line logs one line of a job's output. On the console it is the job's name
// and the line; in JSON they are the keys "job" and "line". Longer lines than
// maxLine are cut: build.log has them whole.
func Line(log *zap.Logger, name, text string) {
	log.Info(lineMessage, zap.String("job", name), zap.String("line", shorten(Clean(text))))
}
