package nixpkgs_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nix"
	"osbuilder/vmimage/internal/nixpkgs"
)

const rev = "47ec8b0206b6307a2d458d388e4dd17a6aea8bdd"

// A world is a server of channels, and Nix's programs as they behave when
// things go well: nix-prefetch-url writes down how it was called.
type world struct {
	nixpkgs.Resolver
	tree  string // what is "in the store"
	calls string
	said  []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{tree: filepath.Join(dir, "tree"), calls: filepath.Join(dir, "calls")}
	write(t, filepath.Join(w.tree, "nixos/lib/eval-config.nix"), "")
	write(t, filepath.Join(w.tree, ".version"), "26.05\n")
	write(t, filepath.Join(w.tree, ".version-suffix"), ".1234.47ec8b0206b6")
	write(t, filepath.Join(w.tree, ".git-revision"), rev+"\n")
	bin := filepath.Join(dir, "bin")
	program(t, bin, "nix-prefetch-url", fmt.Sprintf(`echo "$*" >>%s; [ -z "$FAIL" ] || { echo "$FAIL" >&2; exit 1; }; printf '%%s\n' 0abc %s`, w.calls, w.tree))
	program(t, bin, "nix-store", "exit 0")
	t.Setenv("PATH", bin+":"+os.Getenv("PATH")) //nolint:forbidigo // the test's own

	mux := http.NewServeMux()
	mux.HandleFunc("/nixos-26.05/git-revision", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/release/nixos-26.05.1234/git-revision", http.StatusFound)
	})
	mux.HandleFunc("/release/nixos-26.05.1234/git-revision", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, rev)
	})
	mux.HandleFunc("/nixos-junk/git-revision", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "<html>log in to the hotel's network</html>")
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)

	say := func(line string) { w.said = append(w.said, line) }
	w.Resolver = nixpkgs.Resolver{Nix: nix.Runner{Sink: say}, Say: say, Root: filepath.Join(dir, "root"), Channels: server.URL}
	return w
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func program(t *testing.T, dir, name, text string) {
	t.Helper()
	write(t, filepath.Join(dir, name), "#!/bin/sh\n"+text+"\n")
	if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (w *world) called(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(w.calls)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(text))
}

func TestAChannelIsTheReleaseThatItIsNow(t *testing.T) {
	w := newWorld(t)
	got, err := w.Resolve(t.Context(), "nixos-26.05", "")
	if err != nil {
		t.Fatal(err)
	}
	url := w.Channels + "/release/nixos-26.05.1234/nixexprs.tar.xz"
	want := nixpkgs.Nixpkgs{
		Source: "nixos-26.05", Revision: rev, Release: "26.05.1234.47ec8b0206b6",
		Hash: "sha256:0abc", Path: w.tree, URL: url,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got, want := w.called(t), "--unpack --print-path --name nixpkgs "+url+" --log-format internal-json"; got != want {
		t.Errorf("called with %q, want %q", got, want)
	}
}

func TestAPinIsWrittenOnceAndKeptTo(t *testing.T) {
	w := newWorld(t)
	pin := filepath.Join(t.TempDir(), "pin.json")
	first, err := w.Resolve(t.Context(), "nixos-26.05", pin)
	if err != nil {
		t.Fatal(err)
	}
	w.Channels = "http://127.0.0.1:1" // no longer asked
	second, err := w.Resolve(t.Context(), "nixos-26.05", pin)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(first, second); diff != "" {
		t.Errorf("(-first +second)\n%s", diff)
	}
	calls := strings.Split(w.called(t), "\n")
	if want := "nixexprs.tar.xz 0abc --log-format"; len(calls) != 2 || !strings.Contains(calls[1], want) {
		t.Errorf("the second call %q has no %q", calls, want)
	}

	// Another name is not what was pinned.
	if _, err := w.Resolve(t.Context(), rev, pin); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(pin)
	if err != nil || !strings.Contains(string(text), `"source": "`+rev+`"`) {
		t.Errorf("the pin is %s, %v", text, err)
	}
}

func TestARevisionAndAnAddress(t *testing.T) {
	for name, url := range map[string]string{
		rev:                             "https://github.com/NixOS/nixpkgs/archive/" + rev + ".tar.gz",
		"https://example.org/np.tar.gz": "https://example.org/np.tar.gz",
	} {
		w := newWorld(t)
		got, err := w.Resolve(t.Context(), name, "")
		if err != nil || got.URL != url || got.Source != name || got.Revision != rev {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

func TestAPathIsTakenAsItIs(t *testing.T) {
	w := newWorld(t)
	got, err := w.Resolve(t.Context(), w.tree, filepath.Join(t.TempDir(), "pin"))
	want := nixpkgs.Nixpkgs{Source: w.tree, Revision: rev, Release: "26.05.1234.47ec8b0206b6", Path: w.tree}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got)\n%s", err, diff)
	}
	if _, err := os.Stat(w.calls); err == nil {
		t.Error("something was downloaded")
	}
}

func TestFailuresAreExplained(t *testing.T) {
	for _, test := range []struct {
		name, nixpkgs string
		with          func(t *testing.T, w *world)
		class         explain.Class
		summary       string
	}{
		{"no network", "nixos-26.05", func(_ *testing.T, w *world) { w.Channels = "http://127.0.0.1:1" }, explain.Network, "no network: the channel nixos-26.05 can't be looked up"},
		{"no such channel", "nixos-19.99", func(*testing.T, *world) {}, explain.Network, "the channel nixos-19.99 can't be looked up: "},
		{"a captive portal", "nixos-junk", func(*testing.T, *world) {}, explain.Network, "the channel nixos-junk can't be looked up: "},
		{"no nixpkgs there", "/nonexistent", func(*testing.T, *world) {}, explain.Evaluation, "/nonexistent in the builder VM is no nixpkgs"},
		{"the download fails", rev, func(t *testing.T, _ *world) {
			t.Setenv("FAIL", "error: unable to download 'https://github.com/x': Could not resolve hostname (6) Could not resolve host: github.com")
		}, explain.Network, "no network: can't download https://github.com/x: Could not resolve host: github.com"},
		{"what was pinned has changed", rev, func(t *testing.T, _ *world) {
			t.Setenv("FAIL", "error: hash mismatch for '/tmp/nix-1/unpacked/x'")
		}, explain.Hash, "nixpkgs from https://github.com/NixOS/nixpkgs/archive/" + rev + ".tar.gz is not the one that was pinned"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			test.with(t, w)
			_, err := w.Resolve(t.Context(), test.nixpkgs, "")
			var e *explain.Error
			if !errors.As(err, &e) || e.Class != test.class || !strings.HasPrefix(e.Summary, test.summary) || e.Advice == "" {
				t.Errorf("got %#v, want [%s] %s", err, test.class, test.summary)
			}
		})
	}
}

func TestABrokenPinIsAnError(t *testing.T) {
	w := newWorld(t)
	pin := filepath.Join(t.TempDir(), "pin")
	write(t, pin, "{")
	if _, err := w.Resolve(t.Context(), rev, pin); err == nil || !strings.Contains(err.Error(), pin) {
		t.Errorf("error %v doesn't name the file", err)
	}
}

func TestCheck(t *testing.T) {
	for _, good := range []string{"nixos-26.05", "nixos-unstable-small", "nixpkgs-unstable", rev, "/nix/store/x", "https://x/y", "file:///x"} {
		if err := nixpkgs.Check(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "26.05", "nixos-", "NIXOS-26.05", "--option", rev[1:], "ftp://x", "nixos-26.05/../x", "./x", "nixos-26.05 x", "nixos-26.05\n"} {
		if err := nixpkgs.Check(bad); err == nil {
			t.Errorf("%q passes", bad)
		}
	}
}
