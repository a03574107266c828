{{/* flawstream's settings, used in the ConfigMap and in Serve's `args`. */}}

{{- define "flawstream.redisSecret" -}}
{{- if eq .Values.redis.mode "external" -}}
{{- .Values.redis.external.existingSecret -}}
{{- else -}}
{{- default (printf "%s-redis" (include "flawstream.fullname" .)) .Values.redis.bundled.auth.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "flawstream.redisPasswordKey" -}}
{{- ternary .Values.redis.external.passwordKey .Values.redis.bundled.auth.passwordKey (eq .Values.redis.mode "external") -}}
{{- end -}}

{{- define "flawstream.apiSecret" -}}
{{- default (printf "%s-api" (include "flawstream.fullname" .)) .Values.api.auth.existingSecret -}}
{{- end -}}

{{- define "flawstream.settings" -}}
{{- $redis := dict -}}
{{- if eq .Values.redis.mode "external" -}}
{{- $external := .Values.redis.external -}}
{{- $redis = dict "url" $external.url -}}
{{- with $external.username }}{{ $_ := set $redis "username" . }}{{ end -}}
{{- with $external.tls.caSecret }}{{ $_ := set $redis "tls_ca_file" "/run/secrets/flawstream/redis-ca/ca.crt" }}{{ end -}}
{{- if $external.tls.clientSecret -}}
{{- $_ := set $redis "tls_cert_file" "/run/secrets/flawstream/redis-client/tls.crt" -}}
{{- $_ := set $redis "tls_key_file" "/run/secrets/flawstream/redis-client/tls.key" -}}
{{- end -}}
{{- if $external.sentinels -}}
{{- $_ := set $redis "sentinels" $external.sentinels -}}
{{- $_ := set $redis "sentinel_primary" $external.sentinelPrimary -}}
{{- end -}}
{{- if $external.cluster }}{{ $_ := set $redis "cluster" true }}{{ end -}}
{{- else -}}
{{- $redis = dict "url" (printf "redis://%s-redis:6379/0" (include "flawstream.fullname" .)) -}}
{{- end -}}
{{- if include "flawstream.redisSecret" . }}{{ $_ := set $redis "password_file" "/run/secrets/flawstream/redis/password" }}{{ end -}}
{{- $api := dict "host" "0.0.0.0" "port" 8000 -}}
{{- if .Values.api.auth.enabled }}{{ $_ := set $api "tokens_file" "/run/secrets/flawstream/api/tokens" }}{{ end -}}
{{- $registry := dict "root" (ternary .Values.registry.s3.url "/models" (eq .Values.registry.type "s3")) -}}
{{/* No metrics port: it is in the workers' arguments, so that other commands in the same pod do not open it too. */}}
{{- $metrics := dict "host" "0.0.0.0" -}}
{{- $made := dict "redis" $redis "api" $api "registry" $registry "metrics" $metrics -}}
{{- mergeOverwrite (deepCopy .Values.settings) $made | toYaml -}}
{{- end -}}
