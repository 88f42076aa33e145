package agent

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/dunlin/dunlin/agent/state"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
	"github.com/dunlin/dunlin/models/signing"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// testTrust makes a trust document in which one key is everything.
func testTrust(t testing.TB) (crypto.Signer, *dunlinv1.SignedTrust) {
	t.Helper()
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	k, err := signing.NewTrustKey(key.Public(), nil, "test")
	if err != nil {
		t.Fatal(err)
	}
	keys := []*dunlinv1.TrustKey{k}
	return key, signTrust(t, key, &dunlinv1.TrustDocument{
		Version: 1, IssuedAt: timestamppb.New(time.Now().Add(-time.Minute)), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour)),
		RootKeys: keys, ControllerKeys: keys, PublisherKeys: keys, AgentKeys: keys,
	})
}

func signTrust(t testing.TB, key crypto.Signer, d *dunlinv1.TrustDocument) *dunlinv1.SignedTrust {
	t.Helper()
	signed, err := signing.NewTrust(d)
	if err == nil {
		err = signing.SignTrust(signed, key)
	}
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// nextTrust makes the document after one.
func nextTrust(t testing.TB, key crypto.Signer, after *dunlinv1.SignedTrust, change func(*dunlinv1.TrustDocument)) *dunlinv1.SignedTrust {
	t.Helper()
	d, err := signing.ParseTrustDocument(after)
	if err != nil {
		t.Fatal(err)
	}
	d.Version++
	if change != nil {
		change(d)
	}
	return signTrust(t, key, d)
}

func TestTakeTrust(t *testing.T) {
	c := startControl(t)
	cfg := testConfig(t, c)
	a, store := openAgentAndStore(t, cfg)
	second := nextTrust(t, c.key, c.Trust[0], nil)
	third := nextTrust(t, c.key, second, nil)
	// A join that was cut short begins anew: the device believes nobody yet.
	for range 2 {
		if err := a.follow.TakeTrust(t.Context(), []*dunlinv1.SignedTrust{c.Trust[0], second}); err != nil || a.follow.Trust().Version() != 2 {
			t.Errorf("a join that is repeated: %v", err)
		}
	}
	if err := a.follow.Identity.Join(t.Context(), a.follow.Info()); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		chain []*dunlinv1.SignedTrust
		want  uint64
		err   string
	}{
		{nil, 1, ""},
		{[]*dunlinv1.SignedTrust{c.Trust[0]}, 1, ""},
		{[]*dunlinv1.SignedTrust{third}, 1, "2 to 2 are missing"},
		{[]*dunlinv1.SignedTrust{second, third}, 3, ""},
		{[]*dunlinv1.SignedTrust{c.Trust[0]}, 3, "is older than the one in force"},
	} {
		err := a.follow.TakeTrust(t.Context(), step.chain)
		if (err == nil) != (step.err == "") || err != nil && !strings.Contains(err.Error(), step.err) {
			t.Errorf("error %v, want %q in it", err, step.err)
		}
		if got := a.follow.Trust(); (got == nil) != (step.want == 0) || got != nil && got.Version() != step.want {
			t.Errorf("has document %v, want %d", got, step.want)
		}
	}
	stored, err := store.Trust(t.Context())
	if err != nil || stored.Version() != 3 {
		t.Errorf("stored %v, %v", stored, err)
	}
	events, err := store.Pending(t.Context(), 10)
	if err != nil || len(events) != 2 || events[0].Kind != "trust.refused" {
		t.Errorf("events %v, %v", events, err)
	}
}

func TestVerify(t *testing.T) {
	key, trust := testTrust(t)
	data := t.TempDir()
	store, err := state.Open(t.Context(), filepath.Join(data, stateFile), state.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	binary := []byte("#!/bin/sh\n")
	file := filepath.Join(data, "dunlin-agent.new")
	signature := func(b signing.Binary) []byte {
		raw, err := signing.SignBinary(signing.Signer{Key: key}, b, sha256.Sum256(binary))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	good := signature(signing.Binary{Version: "0.7.0", OS: runtime.GOOS, Arch: runtime.GOARCH})
	refused := 0
	check := func(name string, binary, signature []byte, want string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(file, binary, 0o700), os.WriteFile(file+SignatureSuffix, signature, 0o600)); err != nil {
			t.Fatal(err)
		}
		if signature == nil {
			os.Remove(file + SignatureSuffix)
		}
		var out strings.Builder
		err := Verify(t.Context(), []string{"--data", data, file}, func(string) string { return "" }, &out, io.Discard)
		if want == "" {
			if err != nil || out.String() != fmt.Sprintf("dunlin-agent 0.7.0 %s/%s\n", runtime.GOOS, runtime.GOARCH) {
				t.Errorf("%s: %v, printed %q", name, err, &out)
			}
			return
		}
		refused++
		if err == nil || !strings.Contains(err.Error(), want) || out.Len() > 0 {
			t.Errorf("%s: %v, want %q in it; printed %q", name, err, want, &out)
		}
		events, err := store.Pending(t.Context(), 100)
		if err != nil || len(events) != refused || events[refused-1].Kind != "agent-binary.refused" || !strings.Contains(events[refused-1].Message, want) {
			t.Errorf("%s: events %v, %v", name, events, err)
		}
	}
	set := func(signed *dunlinv1.SignedTrust) {
		t.Helper()
		tr, err := signing.Advance(nil, []*dunlinv1.SignedTrust{signed})
		if err == nil {
			err = store.SetTrust(t.Context(), tr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	check("no trust document", binary, good, "has no trust document")
	set(trust)
	check("good", binary, good, "")
	check("no signature", binary, nil, "it has no signature")
	check("another file", append(binary, '\n'), good, "the file has")
	check("another system", binary, signature(signing.Binary{Version: "0.7.0", OS: "plan9", Arch: "amd64"}), "is for plan9/amd64")
	check("not a signature", binary, []byte("{}"), "mediaType")
	second := nextTrust(t, key, trust, func(d *dunlinv1.TrustDocument) { d.AgentFloor = "0.7.0" })
	set(second)
	check("at the floor", binary, good, "")
	check("below the floor", binary, signature(signing.Binary{Version: "0.6.9", OS: runtime.GOOS, Arch: runtime.GOARCH}), "version 0.6.9 is below the floor 0.7.0")
	set(nextTrust(t, key, second, func(d *dunlinv1.TrustDocument) { d.AgentKeys = nil }))
	check("by a removed key", binary, good, "signed by no agent key")
	if err := Verify(t.Context(), []string{"--data", data}, func(string) string { return "" }, io.Discard, io.Discard); !errors.Is(err, program.ErrUsage) {
		t.Errorf("no file: %v", err)
	}
}
