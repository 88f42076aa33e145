package agent

import (
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/dunlin/dunlin/agent/access"
	"github.com/dunlin/dunlin/internal/pki"
	"github.com/dunlin/dunlin/internal/program"
)

// checkPorts says what the listeners lack: off loopback they speak TLS, and
// know who asks.
func (s *Serving) checkPorts(add func(name string, err error)) {
	secure := s.TLSCert != "" && s.TLSKey != "" || s.Certificate != nil
	if (s.TLSCert == "") != (s.TLSKey == "") {
		add("tls-cert, tls-key", errors.New("one is not enough: both are needed for TLS"))
	}
	if s.ClientCA != "" && !secure {
		add("client-ca", errors.New("needs --tls-cert and --tls-key: clients show certificates to who has one"))
	}
	check := func(name, address string) {
		err := program.CheckListen(address, secure)
		if err == nil && s.APIKeys == "" && s.ClientCA == "" && !onLoopback(address) {
			err = fmt.Errorf("%q is not on loopback: other addresses need --api-keys or --client-ca, by which the agent knows who asks; or use 127.0.0.1", address)
		}
		add(name, err)
	}
	check("listen", s.Listen)
	if s.GRPCListen != "" {
		check("grpc-listen", s.GRPCListen)
	}
	if s.SharedMemory && (!onLoopback(s.Listen) || s.GRPCListen != "" && !onLoopback(s.GRPCListen)) {
		add("shared-memory", errors.New("needs listen and grpc-listen on loopback: only programs of this host share its memory"))
	}
}

// guard gives nil where everybody may ask.
func (s *Serving) guard() (*access.Guard, error) {
	if s.APIKeys == "" && s.ClientCA == "" {
		return nil, nil
	}
	return access.New(access.Config{Rules: s.APIKeys, ClientCA: s.ClientCA, Log: s.Log})
}

// loadTLS gives nil where the listeners do not speak TLS. A certificate of the
// settings goes before the device's own.
func (s *Serving) loadTLS(g *access.Guard) (*tls.Config, error) {
	certificate := s.Certificate
	if s.TLSCert != "" {
		files, err := pki.NewFiles(s.TLSCert, s.TLSKey)
		if err != nil {
			return nil, fmt.Errorf("tls-cert, tls-key: %w", err)
		}
		certificate = files.Certificate
	}
	if certificate == nil {
		return nil, nil
	}
	return g.TLS(certificate), nil
}
