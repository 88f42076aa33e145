package main

import (
	"cmp"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
)

// settings say which controller to talk to, as whom, and by whose certificate
// it is known.
type settings struct {
	URL   string `yaml:"url"`
	Token string `yaml:"token"`
	// TokenID names a token that login made and logout takes back.
	TokenID string `yaml:"token-id,omitempty"`
	// CA holds, as PEM, the certificate authorities of the controller that count
	// beside the system's.
	CA string `yaml:"ca,omitempty"`
}

// roots gives the certificate authorities of the controller.
func (s settings) roots() ([]*x509.Certificate, error) {
	if s.CA == "" {
		return nil, nil
	}
	return pki.DecodeCertificates([]byte(s.CA))
}

// readCA gives the certificate authorities in a file as they are kept.
func readCA(path string) (string, error) {
	certs, err := pki.ReadCertificates(path)
	if err != nil {
		return "", err
	}
	return string(pki.EncodeCertificates(certs...)), nil
}

// maxSettings bounds the settings file, and maxContexts the controllers in it;
// a larger one is not ours.
const (
	maxSettings = 512 << 10
	maxContexts = 64
)

func settingsPath() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("find the folder of settings: %w", err)
	}
	return filepath.Join(dir, "dunlin", "config.yaml"), nil
}

// readPrivate gives the content of a file in the folder of settings, nil
// where there is none.
func readPrivate(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	if info.Size() > maxSettings {
		return nil, fmt.Errorf("read settings: %s has %d bytes, allowed are %d", path, info.Size(), maxSettings)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	return b, nil
}

// writePrivate replaces a file in the folder of settings at once or not at
// all, readable by its owner only.
func writePrivate(path string, v any) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	if len(b) > maxSettings {
		return fmt.Errorf("write settings: they have %d bytes, allowed are %d: is --ca a file of one controller's authorities?", len(b), maxSettings)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	if err := pki.WriteFile(path, b, 0o600); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// settings gives the settings in force. The flag --context leaves no room for
// the environment's; else those of the environment come before the stored ones.
// A stored token goes only to the controller it was stored for, and so do stored
// certificate authorities count for no other.
func (c *cli) settings() (settings, error) {
	var s settings
	if c.context == "" {
		s = settings{URL: os.Getenv("DUNLIN_URL"), Token: os.Getenv("DUNLIN_TOKEN")}
		if path := os.Getenv("DUNLIN_CA"); path != "" {
			var err error
			if s.CA, err = readCA(path); err != nil {
				return settings{}, fmt.Errorf("DUNLIN_CA: %w", err)
			}
		}
	}
	if s.URL == "" || s.Token == "" || s.CA == "" && strings.HasPrefix(s.URL, "https:") {
		all, err := readContexts()
		if err != nil {
			return settings{}, err
		}
		_, stored, err := c.chosen(all)
		if err != nil && s.URL == "" {
			return settings{}, err
		}
		if s.URL == "" {
			s.URL = stored.URL
		}
		if sameURL(s.URL, stored.URL) {
			s.Token, s.CA = cmp.Or(s.Token, stored.Token), cmp.Or(s.CA, stored.CA)
		}
	}
	u, err := checkURL(s.URL)
	if err != nil {
		return settings{}, fmt.Errorf("%s\nrun: dunlin login URL, or set DUNLIN_URL", err.Error())
	}
	s.URL = u
	if s.Token == "" {
		return settings{}, codeError{code: exitNotAllowed, err: fmt.Errorf("no token for %s\nrun: dunlin login %s (or set DUNLIN_TOKEN)", u, u)}
	}
	return s, nil
}

func sameURL(a, b string) bool {
	return strings.TrimRight(a, "/") == strings.TrimRight(b, "/")
}

// checkURL refuses what is not a base URL that a token may be sent to:
// https, or http to this machine itself. It gives it without a slash at the
// end.
func checkURL(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", usagef("URL %q is not of the form https://HOST[:PORT] or http://127.0.0.1:PORT", s)
	}
	switch {
	case u.Scheme == "https":
	case u.Scheme == "http" && program.Loopback(u.Hostname()):
	case u.Scheme == "http":
		return "", usagef("refusing to send a token to %s: http:// is in clear and only for this machine itself; use https://", s)
	default:
		return "", usagef("URL %q has scheme %q, allowed are https and, to this machine itself, http", s, u.Scheme)
	}
	return strings.TrimRight(u.String(), "/"), nil
}
