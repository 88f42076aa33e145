package controller

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"

	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/program"
)

// checkOIDC gives the faults of what is said of OpenID Connect.
func (c *Config) checkOIDC() (faults []error) {
	if c.OIDCIssuer == "" {
		if c.OIDCClientID != "" {
			faults = append(faults, errors.New("oidc-client-id needs oidc-issuer"))
		}
		return faults
	}
	u, err := url.Parse(c.OIDCIssuer)
	switch {
	case err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		faults = append(faults, errors.New("oidc-issuer is not https://host[/path]")) // it could hold a password
	case u.Scheme != "https" && (u.Scheme != "http" || !program.Loopback(u.Hostname())):
		faults = append(faults, fmt.Errorf("oidc-issuer %q is not https, which only an issuer on loopback may lack", c.OIDCIssuer))
	}
	for _, s := range [][2]string{{"oidc-client-id", c.OIDCClientID}, {"oidc-name-claim", c.OIDCNameClaim}, {"oidc-role-claim", c.OIDCRoleClaim}} {
		if s[1] == "" {
			faults = append(faults, fmt.Errorf("oidc-issuer needs %s", s[0]))
		}
	}
	return faults
}

// oidc gives what verifies users of OpenID Connect; nil: there are none.
func (c *Config) oidc(log *slog.Logger) *identity.OIDC {
	if c.OIDCIssuer == "" {
		return nil
	}
	return identity.NewOIDC(identity.OIDCConfig{
		Issuer: c.OIDCIssuer, ClientID: c.OIDCClientID, NameClaim: c.OIDCNameClaim, RoleClaim: c.OIDCRoleClaim, ScopeClaim: c.OIDCScopeClaim, Log: log,
	})
}
