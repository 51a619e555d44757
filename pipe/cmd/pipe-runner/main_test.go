package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for name, tc := range map[string]struct {
		args  []string
		usage bool
		want  string // in the output, or in the error
	}{
		"version":       {[]string{"version"}, false, "protocol 1"},
		"nothing":       {nil, true, "usage"},
		"unknown":       {[]string{"walk"}, true, `unknown command "walk"`},
		"unknown flag":  {[]string{"run", "--slot", "2"}, true, "-slot"},
		"left over":     {[]string{"run", "now"}, true, `unexpected "now"`},
		"no image":      {[]string{"run", "--image-file", "/nonexistent"}, false, "read the image's name"},
		"relative path": {[]string{"run", "--image", "x", "--data", "data"}, false, "absolute"},
		"slots":         {[]string{"run", "--image", "x", "--slots", "-1"}, false, "-1 slots"},
		"memory":        {[]string{"run", "--image", "x", "--job-memory", "-1"}, false, "of memory"},
		"output":        {[]string{"run", "--image", "x", "--job-output", "2000000000000"}, true, "of output"},
		"no such user":  {[]string{"run", "--image", "x", "--data", filepath.Join(t.TempDir(), "d"), "--sftp-user", "nobody-here"}, false, "nobody-here"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := command(t.Context(), tc.args, &out, &out)
			text := out.String()
			if err != nil {
				text = err.Error()
			}
			if errors.Is(err, errUsage) != tc.usage || !strings.Contains(text, tc.want) {
				t.Errorf("%v: %q, want %q", err, text, tc.want)
			}
		})
	}
}

func TestStopHook(t *testing.T) {
	t.Setenv("SERVICE_RESULT", "success")
	t.Setenv("EXIT_CODE", "exited")
	t.Setenv("EXIT_STATUS", "0")
	path := filepath.Join(t.TempDir(), "result")
	if err := command(t.Context(), []string{"result", "--file", path}, nil, nil); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || !bytes.Contains(data, []byte(`"service_result":"success"`)) {
		t.Errorf("result %s, %v", data, err)
	}
}
