// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {
    AccessControlDefaultAdminRules
} from "@openzeppelin/contracts/access/extensions/AccessControlDefaultAdminRules.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";
import {IAdapterRegistry} from "./interfaces/IAdapterRegistry.sol";

/// @title Models, their terms, and the parameters of the network
contract AdapterRegistry is IAdapterRegistry, AccessControlDefaultAdminRules {
    struct Version {
        bytes32 hash;
        uint32 number;
        uint64 effectiveAt;
    }

    struct Model {
        bytes32 base;
        Version terms;
        bool revoked;
    }

    /// @notice May publish parameters.
    bytes32 public constant PARAMETERS_ROLE = keccak256("PARAMETERS_ROLE");

    uint256 private constant MAX_NAME = 128;
    uint256 private constant MAX_URI = 2048;
    uint256 private constant MAX_DOCUMENT = 32768;

    uint64 private immutable NOTICE;
    mapping(address owner => mapping(bytes32 digest => Model)) private _models;
    Version private _parameters;

    /// @param admin gives and takes PARAMETERS_ROLE; a change of admin takes `notice_` too
    /// @param notice_ seconds between the publication of a later version and its effect
    constructor(address admin, uint64 notice_) AccessControlDefaultAdminRules(SafeCast.toUint48(notice_), admin) {
        NOTICE = notice_;
    }

    /// @inheritdoc IAdapterRegistry
    function register(
        bytes32 digest,
        bytes32 base,
        string calldata name,
        string calldata uri,
        string calldata termsDocument
    ) external {
        if (digest == bytes32(0)) revert ZeroDigest();
        if (base == digest) revert OwnBase(digest);
        _checkLength(name, MAX_NAME);
        _checkLength(uri, MAX_URI);
        Model storage model = _models[msg.sender][digest];
        if (model.terms.number != 0) revert ModelAlreadyRegistered(msg.sender, digest);

        model.base = base;
        emit ModelRegistered(msg.sender, digest, base, name, uri);
        _publishTerms(digest, model, termsDocument);
    }

    /// @inheritdoc IAdapterRegistry
    function publishTerms(bytes32 digest, string calldata document) external {
        _publishTerms(digest, _ownModel(digest), document);
    }

    /// @inheritdoc IAdapterRegistry
    function setAccess(bytes32 digest, string calldata document) external {
        _ownModel(digest);
        _checkLength(document, MAX_DOCUMENT);
        emit AccessChanged(msg.sender, digest, document);
    }

    /// @inheritdoc IAdapterRegistry
    function revoke(bytes32 digest) external {
        _ownModel(digest).revoked = true;
        emit ModelRevoked(msg.sender, digest);
    }

    /// @inheritdoc IAdapterRegistry
    function publishParameters(string calldata document) external onlyRole(PARAMETERS_ROLE) {
        Version memory next = _next(_parameters, "openlora/parameters/v1", document);
        _parameters = next;
        emit ParametersPublished(next.number, next.hash, next.effectiveAt, document);
    }

    /// @inheritdoc IAdapterRegistry
    function modelOf(address owner, bytes32 digest)
        external
        view
        returns (bytes32 base, uint32 termsVersion, bytes32 termsHash, uint64 effectiveAt, bool revoked)
    {
        Model storage model = _models[owner][digest];
        return (model.base, model.terms.number, model.terms.hash, model.terms.effectiveAt, model.revoked);
    }

    /// @inheritdoc IAdapterRegistry
    function parameters() external view returns (uint32 version, bytes32 digest, uint64 effectiveAt) {
        return (_parameters.number, _parameters.hash, _parameters.effectiveAt);
    }

    /// @inheritdoc IAdapterRegistry
    function notice() external view returns (uint64 seconds_) {
        return NOTICE;
    }

    function _publishTerms(bytes32 digest, Model storage model, string calldata document) private {
        Version memory next = _next(model.terms, "openlora/model-terms/v1", document);
        model.terms = next;
        emit TermsPublished(msg.sender, digest, next.number, next.hash, next.effectiveAt, document);
    }

    function _ownModel(bytes32 digest) private view returns (Model storage model) {
        model = _models[msg.sender][digest];
        if (model.terms.number == 0) revert UnknownModel(msg.sender, digest);
        if (model.revoked) revert ModelIsRevoked(msg.sender, digest);
    }

    /// @dev effectiveAt never decreases: the notice is the same for all, and the first version is the earliest.
    function _next(Version storage newest, string memory tag, string calldata document)
        private
        view
        returns (Version memory)
    {
        _checkLength(document, MAX_DOCUMENT);
        uint64 wait = newest.number == 0 ? 0 : NOTICE;
        return Version({
            hash: sha256(bytes.concat(bytes(tag), bytes(document))),
            number: newest.number + 1,
            effectiveAt: uint64(block.timestamp) + wait
        });
    }

    function _checkLength(string calldata text, uint256 most) private pure {
        uint256 length = bytes(text).length;
        if (length == 0 || length > most) revert InvalidLength(length, most);
    }
}
