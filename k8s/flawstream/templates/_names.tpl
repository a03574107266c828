{{/* Names and labels. */}}

{{/* At most 28 characters, since KubeRay takes 47 for a RayJob, whose name is `<this>-train-<training.run>`. A cut name does not change when
     training is turned on. Two releases whose names are cut to the same one cannot be in one namespace: Helm refuses the second. */}}
{{- define "flawstream.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $name = default ($name | replace "." "-" | trunc 28) .Values.fullnameOverride | regexFind "^.*[^-]" -}}
{{- if not (regexMatch "^[a-z][a-z0-9-]*$" $name) -}}
{{- fail (printf "%q, from the release's name, is no name for a Service: these start with a letter and have lower-case letters, digits and hyphens (DNS-1035); set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* KubeRay appends `-serve-svc` and `-head-svc` to a RayService's name. */}}
{{- define "flawstream.apiService" -}}{{ include "flawstream.fullname" . }}-serve-svc{{- end -}}
{{- define "flawstream.dashboardService" -}}{{ include "flawstream.fullname" . }}-head-svc{{- end -}}

{{- define "flawstream.serviceAccount" -}}
{{- default (include "flawstream.fullname" .) .Values.serviceAccount.name -}}
{{- end -}}

{{/* Labels for selectors. Without app.kubernetes.io/name and created-by, which KubeRay sets on its pods itself.
     Takes (dict "root" $ "component" "..."). */}}
{{- define "flawstream.selector" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/part-of: flawstream
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "flawstream.labels" -}}
app.kubernetes.io/name: flawstream
{{ include "flawstream.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods. Without versions, since a change of a label would start a new Ray cluster. Takes "place" too. */}}
{{- define "flawstream.podLabels" -}}
{{ include "flawstream.selector" . }}
{{- with merge (dict) (include "flawstream.extras" . | fromYaml).labels .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "flawstream.podAnnotations" -}}
{{- with (include "flawstream.extras" . | fromYaml).annotations }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{- define "flawstream.image" -}}
{{- $image := .Values.image -}}
{{- include "flawstream.imageName" (list $image.repository (default .Chart.AppVersion $image.tag) $image.digest) -}}
{{- end -}}

{{- define "flawstream.cudaImage" -}}
{{- $image := .Values.image -}}
{{- include "flawstream.imageName" (list $image.repository (default (printf "%s-cuda" (default .Chart.AppVersion $image.tag)) $image.cudaTag) $image.cudaDigest) -}}
{{- end -}}

{{- define "flawstream.valkeyImage" -}}
{{- with .Values.image.valkey -}}
{{- include "flawstream.imageName" (list .repository .tag .digest) -}}
{{- end -}}
{{- end -}}

{{/* Takes (list repository tag digest). */}}
{{- define "flawstream.imageName" -}}
{{- ternary (printf "%s@%s" (index . 0) (index . 2)) (printf "%s:%s" (index . 0) (index . 1)) (ne (index . 2) "") -}}
{{- end -}}
