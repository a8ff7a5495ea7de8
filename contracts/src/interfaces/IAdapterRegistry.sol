// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// @title Models, their terms, and the parameters of the network
/// @notice A model is a base model or an adapter, named by its owner and its content digest: nobody can take somebody
/// else's. Documents are in the events, the contract keeps their hashes. Terms and parameters are append-only versions:
/// the first is effective at once, each later one only after the notice, so that nothing changes after the fact.
interface IAdapterRegistry {
    /// @notice A model was registered. `base` is zero for a base model.
    event ModelRegistered(address indexed owner, bytes32 indexed digest, bytes32 base, string name, string uri);
    /// @notice A version of a model's terms was published; `termsHash` is SHA-256("openlora/model-terms/v1" ‖ document).
    event TermsPublished(
        address indexed owner,
        bytes32 indexed digest,
        uint32 version,
        bytes32 termsHash,
        uint64 effectiveAt,
        string document
    );
    /// @notice The owner said who may use the model; effective at once.
    event AccessChanged(address indexed owner, bytes32 indexed digest, string document);
    /// @notice The model was revoked for good, from this block on.
    event ModelRevoked(address indexed owner, bytes32 indexed digest);
    /// @notice A version of the parameters was published; `digest` is SHA-256("openlora/parameters/v1" ‖ document).
    event ParametersPublished(uint32 indexed version, bytes32 digest, uint64 effectiveAt, string document);

    /// @notice A content digest is not zero.
    error ZeroDigest();
    /// @notice A model is not its own base.
    error OwnBase(bytes32 digest);
    /// @notice This owner registered this digest already.
    error ModelAlreadyRegistered(address owner, bytes32 digest);
    /// @notice This owner registered no such model.
    error UnknownModel(address owner, bytes32 digest);
    /// @notice The model is revoked, for good.
    error ModelIsRevoked(address owner, bytes32 digest);
    /// @notice A text is empty or longer than allowed.
    error InvalidLength(uint256 length, uint256 most);

    /// @notice Registers a model with its first terms; the caller becomes its owner.
    /// @param digest the content digest of the model's manifest
    /// @param base the base model's digest, or zero if this is a base model
    /// @param name 1 to 128 bytes
    /// @param uri where to fetch it, 1 to 2048 bytes
    /// @param termsDocument the terms, RFC 8785 JSON of 1 to 32768 bytes
    function register(
        bytes32 digest,
        bytes32 base,
        string calldata name,
        string calldata uri,
        string calldata termsDocument
    ) external;

    /// @notice Publishes the next version of the terms of one of the caller's models, effective after the notice.
    /// @param digest the model
    /// @param document the terms, RFC 8785 JSON of 1 to 32768 bytes
    function publishTerms(bytes32 digest, string calldata document) external;

    /// @notice Says who may use one of the caller's models, effective at once.
    /// @param digest the model
    /// @param document the JSON of a card's `access`, 1 to 32768 bytes
    function setAccess(bytes32 digest, string calldata document) external;

    /// @notice Revokes one of the caller's models for good.
    /// @param digest the model
    function revoke(bytes32 digest) external;

    /// @notice Publishes the next version of the parameters, effective after the notice. Only with PARAMETERS_ROLE.
    /// @param document RFC 8785 JSON of 1 to 32768 bytes
    function publishParameters(string calldata document) external;

    /// @notice A model with the newest version of its terms, which may not be effective yet; all zero if unknown.
    /// @param owner the model's owner
    /// @param digest its content digest
    /// @return base its base model's digest, zero for a base model
    /// @return termsVersion number of the newest terms, from 1
    /// @return termsHash their hash
    /// @return effectiveAt from when they are in force, in seconds since 1970
    /// @return revoked whether it is revoked
    function modelOf(address owner, bytes32 digest)
        external
        view
        returns (bytes32 base, uint32 termsVersion, bytes32 termsHash, uint64 effectiveAt, bool revoked);

    /// @notice The newest version of the parameters, which may not be effective yet; all zero if there is none.
    /// @return version its number, from 1
    /// @return digest the hash of the document
    /// @return effectiveAt from when they are in force, in seconds since 1970
    function parameters() external view returns (uint32 version, bytes32 digest, uint64 effectiveAt);

    /// @notice How long after its publication a later version becomes effective.
    /// @return seconds_ seconds
    function notice() external view returns (uint64 seconds_);
}
