package config

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/hint"
)

func TestDefaults(t *testing.T) {
	for name, environ := range map[string][]string{
		"nothing set": nil,
		"set empty":   {"SETTLE=", "PUID=", "TAKE_OVER= ", "COMPOSE_PROJECT_NAME="},
	} {
		got, err := load[Config](environ)
		if err != nil {
			t.Fatal(err)
		}
		want := Config{
			Compose: Compose{Separator: ":", Project: "osbuilder"}, Owner: Owner{1000, 1000},
			LogLevel: "info", LogFormat: "console", LogColor: "auto",
			Cores: "4", Memory: "16G", Disk: "128G",
			Settle: 2 * time.Second, Rescan: 10 * time.Second, JobTimeout: 6 * time.Hour, MinFree: 2 << 30, KeepDays: 30,
			Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05",
			Paths: DefaultPaths(),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestAllSet(t *testing.T) {
	got, err := load[Config]([]string{
		"COMPOSE_FILE=a.yaml:b.yaml", "COMPOSE_PROFILES=x", "COMPOSE_PROJECT_NAME=mine", "PUID=0", "PGID=2147483647",
		"LOG_LEVEL=debug", "LOG_FORMAT=json", "LOG_COLOR=always", "NO_COLOR=1", "CPU_CORES=2", "RAM_SIZE=8G", "DISK_SIZE=1T", "KVM=N", "SETTLE=500ms", "RESCAN=1m", "JOB_TIMEOUT=0", "TAKE_OVER=y", "MIN_FREE=500M", "KEEP_DAYS=0",
		"FORMAT=install-iso", "SYSTEM=aarch64-linux", "NIXPKGS=/nix/nixpkgs",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Compose: Compose{"a.yaml:b.yaml", ":", "x", "mine"}, Owner: Owner{0, 2147483647},
		LogLevel: "debug", LogFormat: "json", LogColor: "always", NoColor: "1",
		Cores: "2", Memory: "8G", Disk: "1T", KVM: "N",
		Settle: 500 * time.Millisecond, Rescan: time.Minute, TakeOver: true, MinFree: 500 << 20,
		Format: "install-iso", System: "aarch64-linux", Nixpkgs: "/nix/nixpkgs",
		Paths: DefaultPaths(),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Whoever mends one mistake after the other gives up at the third.
func TestEveryProblemAtOnce(t *testing.T) {
	_, err := load[Config]([]string{
		"LOG_LEVEL=loud", "LOG_FORMAT=xml", "LOG_COLOR=yes", "SETTLE=2", "RESCAN=1ms", "JOB_TIMEOUT=-5m", "TAKE_OVER=perhaps", "MIN_FREE=2", "KEEP_DAYS=-1", "PUID=me", "PGID=-1",
		"FORMAT=ISO", "SYSTEM=x86_64", "NIXPKGS=26.05",
	})
	if !errors.Is(err, ErrSettings) {
		t.Fatal(err)
	}
	lines := strings.Split(err.Error(), "\n  ")[1:]
	slices.Sort(lines)
	want := []string{
		"FORMAT=ISO: want iso or install-iso",
		"JOB_TIMEOUT=-5m0s: want at least 1s, or 0 for no limit",
		"KEEP_DAYS=-1: want a number of days from 1 to 36500, or 0 for ever",
		"LOG_COLOR=yes: want auto, always or never",
		"LOG_FORMAT=xml: want console or json",
		"LOG_LEVEL=loud: want debug, info, warn or error",
		"MIN_FREE=2: want a size with its unit, such as 500M or 2G, or 0",
		"NIXPKGS=26.05: want a channel such as nixos-26.05, a revision of 40 hexadecimal digits, an absolute path in the VM, or the address of a tarball",
		"PGID=-1: want a number from 0 to 2147483647; yours: id -g",
		"PUID=me: want a whole number",
		"RESCAN=1ms: want at least 100ms and at most 24h",
		"SETTLE=2: want a duration, such as 500ms, 2s, 90m or 6h",
		"SYSTEM=x86_64: want x86_64-linux or aarch64-linux",
		"TAKE_OVER=perhaps: want Y or N",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
	if hints := hint.Of(err); len(hints) != 1 {
		t.Errorf("hints %q", hints)
	}
}

func TestColor(t *testing.T) {
	for _, tt := range []struct {
		set, no  string
		terminal bool
		want     bool
	}{
		{"auto", "", true, true},
		{"auto", "", false, false},
		{"auto", "1", true, false},
		{"always", "", false, true},
		{"always", "1", false, true},
		{"never", "", true, false},
	} {
		c := Config{LogColor: tt.set, NoColor: tt.no}
		if got := c.Color(tt.terminal); got != tt.want {
			t.Errorf("LOG_COLOR=%s NO_COLOR=%s, a terminal %v: %v", tt.set, tt.no, tt.terminal, got)
		}
	}
}

func TestNixpkgs(t *testing.T) {
	rev := strings.Repeat("0123456789", 4)
	for _, good := range []string{
		"nixos-26.05", "nixos-26.05-small", "nixos-unstable", "nixpkgs-unstable", rev, "/nix/nixpkgs", "/nix/nixpkgs/",
		"https://example.org/nixpkgs.tar.gz", "http://10.0.0.1:8080/x", "file:///srv/nixpkgs.tar.xz", "https://x/%zz",
	} {
		if !isNixpkgs(good) {
			t.Errorf("%q is refused", good)
		}
	}
	for _, bad := range []string{
		"", "nixos", "26.05", "nixos-", "nixos-26.05 ", "nixos-$(id)", rev[1:], rev + "0", strings.ToUpper(rev[:39]) + "A", "./nixpkgs", "nixpkgs",
		"/", "/nix/../etc", "ftp://x/y", "HTTPS://x/y", "file:/srv/x", "file://host", "file://host/x", "github:NixOS/nixpkgs", "https://x/\x1b[31m", "/a b",
	} {
		if isNixpkgs(bad) {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestInit(t *testing.T) {
	got, err := load[Init]([]string{"AUTHORIZED_KEYS=ssh-ed25519 a\nssh-ed25519 b\n", "PUID=7"})
	if err != nil {
		t.Fatal(err)
	}
	if got.AuthorizedKeys != "ssh-ed25519 a\nssh-ed25519 b" || got.UID != 7 || got.GID != 1000 {
		t.Errorf("%+v", got)
	}
	if _, err := load[Init]([]string{"PUID=2147483648"}); !errors.Is(err, ErrSettings) {
		t.Error(err)
	}
}
